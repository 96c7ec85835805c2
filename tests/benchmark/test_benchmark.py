"""kernelbank benchmark: the arithmetic of its verdicts, and the command end to end on mixers of eight channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernelbank.benchmark.subjects import Runner, Site, check, read
from kernelbank.benchmark.timing import Distribution, exponent, interleave, ratios, verdict
from kernelbank.cli import main
from kernelbank.errors import InputError

SMALL = ["--dim", "8", "--heads", "2", "--grid", "2", "--batch", "1", "--rounds", "3"]


def run(*words: str) -> int:
    return main(["benchmark", *words])


def test_every_candidate_runs_in_every_round() -> None:
    calls: list[str] = []
    taken = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4}
    assert calls.count("a") > 4 and calls.count("b") > 4


def test_a_verdict_needs_close_quartiles_that_exclude_one() -> None:
    steady = ratios([2.0, 2.1, 1.9, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert steady.median == pytest.approx(2.0) and verdict(steady) == "2.00x as fast"
    assert verdict(ratios([1.0, 1.0], [2.0, 2.0])) == "2.00x slower"
    assert verdict(Distribution(1.01, 0.98, 1.05)) == "no difference"
    assert verdict(Distribution(2.0, 1.2, 2.4)).startswith("none: quartiles 2.00x apart")


def test_the_exponent_is_the_power() -> None:
    sizes = [49.0, 196.0, 784.0]
    assert exponent(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_the_json_and_the_figure_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "run.json", tmp_path / "run.svg"
    code = run("vit", "dwsa @linear,hybrid", *SMALL, "--grid", "2", "3", "4", "--memory", "--out", str(out),
               "--figure", str(figure))  # fmt: skip
    record, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert code == 0 and figure.read_text().startswith("<?xml")
    assert [row["subject"] for row in record["rows"]] == ["vit", "dwsa @linear,hybrid"] * 3
    assert record["rows"][0]["verdict"] == "base" and record["rows"][0]["macs"] == 4 * 4 * 8 * 8 + 2 * 4 * 4 * 8
    assert len(record["growth"]) == 2 and "positions^" in shown and "GFLOP/s" in shown


@pytest.mark.parametrize("options", [["--train"], ["--train", "--bf16"], ["--bf16"]])
def test_training_and_half_precision(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("vit", "relu_attention", *SMALL, *options, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_a_model_with_other_mixers_and_an_accelerated_stock_model() -> None:
    site = Site(1, 32)
    for text in ("vit_tiny_patch16_224 : dwsa", "accelerate vit_tiny_patch16_224", "vit_kb_tiny_patch16_224 : dwsa"):
        runner = Runner(read(text), site)
        assert runner.step().shape == (1, 1000) and runner.macs > 1e6 and runner.path_macs() > 1e6
    taken = Runner(read("accelerate vit_tiny_patch16_224"), site).module
    assert any(type(m).__name__ == "AcceleratedLinear" for m in taken.modules())


def test_explain_prints_the_plan_and_every_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--explain", "dwsa", "--grid", "14", "64") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("chosen", "unsupported", "hybrid", "dense", "it runs kernel two_step"))
    assert run("--explain", "vit", "--json", "--train") == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["spec"] == "vit"
    assert {v["path"]: v["reason"] for v in plan["verdicts"]}["mkldnn"].endswith("no derivative")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a subject is missing"),
        (["vit", "--rounds", "0"], "invalid --rounds 0; expected"),
        (["vit", "--batch", "0"], "invalid --batch (0,); expected"),
        (["vit", "vit"], "given twice"),
        (["vit @convs"], "unknown path 'convs'; did you mean 'conv'"),
        (["resnet5"], "unknown model or spec 'resnet5'"),
        (["vit activation=relux"], "relux"),
        (["vit", "deit_small_patch16_224"], "not comparable"),
        (["dwsa @sdpa", *SMALL], "paths that do: vectorised"),
        (["vit @mkldnn", *SMALL, "--train"], "no derivative"),
        (["accelerate vit"], "takes a model"),
        (["vit", "--out", "nowhere/run.json"], "there is no folder nowhere"),
        (["vit", "--figure", "run.gif"], "cannot write run.gif"),
        (["vit", "--dim", "7"], "expected a multiple of 6, the number of heads"),
        (["--explain", "vit", "dwsa"], "takes one spec"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_error_of_a_forced_path_names_the_paths_that_support_the_spec() -> None:
    with pytest.raises(InputError, match=r"paths that do: .*vectorised"):
        check(read("dwsa @sdpa"), Site(1, 2, 8, 2))
    with torch.no_grad():
        check(read("vit @sdpa"), Site(1, 2, 8, 2))


def test_a_compiled_model_and_a_file_in_both_runtimes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    name, file = "vit_kb_test_patch16_64", tmp_path / "a.onnx"
    assert main(["export", name, str(file)]) == 0
    subjects = [name, f"compile:{name}", f"onnx:{file}", f"openvino: {file}"]
    capsys.readouterr()
    sites = ["--img-size", "64", "--batch", "2", "--rounds", "2"]
    assert run(*subjects, *sites, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["subject"] for row in rows] == subjects
    assert rows[0]["macs"] == rows[1]["macs"] > 0 and rows[2]["macs"] is rows[3]["ceiling_fraction"] is None
    assert run(f"onnx:{file}", *sites) == 0 and " - " in capsys.readouterr().out
    assert run(f"onnx:{file}", "--img-size", "32", "--rounds", "1") == 2
    assert "does not run on 8 images of 32 x 32" in capsys.readouterr().err
    assert run(f"onnx:{file}", *sites, "--bf16") == 2 and "expected no --train" in capsys.readouterr().err


@pytest.mark.parametrize("subject", ["onnx:none.onnx", "openvino:none.onnx"])
def test_a_file_that_is_missing(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime" if subject.startswith("onnx") else "openvino")
    assert run(subject, "--rounds", "1") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "invalid file none.onnx: no such file" in err


def test_compile_takes_models_and_mixers() -> None:
    assert read("compile:vit_kb_test_patch16_64 : dwsa").spec == "dwsa" and read("compile: vit").is_mixer
    with pytest.raises(InputError, match="expected compile or accelerate, not both"):
        read("compile:accelerate test_vit")
