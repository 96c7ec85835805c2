"""``kernelbank export`` from the command line, and its page of documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import kernelbank
from kernelbank import cli
from kernelbank.exports.preprocessing import Preprocessing, read_entry

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Capture = pytest.CaptureFixture[str]
OURS = "vit_kb_test_patch16_64"
PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
EXAMPLE, SNIPPET = re.findall(r"^```python(?: script)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(capsys: Capture, *words: object) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def entry(file: Path) -> tuple[Preprocessing, str]:
    if file.suffix == ".onnx":
        return read_entry({p.key: p.value for p in onnx.load(file).metadata_props}["kernelbank"])
    extra = {"kernelbank.json": ""}
    torch.export.load(file, extra_files=extra)
    return read_entry(extra["kernelbank.json"])


def test_what_is_printed(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "a.pt2"
    code, printed, err = run(capsys, OURS, out, "--mixer", "relu_attention")
    assert (code, err) == (0, "")
    first, wrote, compared = printed.splitlines()
    assert first == f"{OURS} with relu_attention (random weights (seed 0))"
    assert wrote.startswith(f"wrote {out}: torch.export, float32, ") and wrote.endswith(" MB, any batch")
    pattern = (r"loaded again in torch: outputs for batches of 1 and 3 random images differ by at most \d\.\de-0[5-9] "
               r"from the model's, which reach 0\.\d+ \(tolerance 1e-04 of that\)")  # fmt: skip
    assert re.fullmatch(pattern, compared)
    code, printed, err = run(capsys, OURS, out, "--overwrite", "--json", "--half", "bfloat16", "--img-size", 32, 48)
    document = json.loads(printed)
    assert (code, err, document["path"], document["dtype"]) == (0, "", str(out), "bfloat16")
    assert 0 < document["difference"] <= document["tolerance"] * document["largest"]
    about, dtype = entry(out)
    assert about.input_size == (3, 32, 48) and dtype == "bfloat16" and about.class_names[0].startswith("tench")
    assert (about.interpolation, about.crop_pct) == ("bicubic", 0.875)


def test_inputs_and_forms_are_printed(capsys: Capture, tmp_path: Path) -> None:
    code, printed, _ = run(capsys, OURS, tmp_path / "a.pt2", "--form", "conv", "--batch", 2)
    _, wrote, compared = printed.splitlines()
    assert code == 0 and wrote.endswith(" MB, a batch of 2, attention as grouped convolutions")
    assert "outputs for a batch of 2 random images differ" in compared
    code, printed, _ = run(capsys, OURS, tmp_path / "b.pt2", "--dynamic-size", "--mixer", "relu_attention")
    _, wrote, compared = printed.splitlines()
    assert code == 0 and wrote.endswith(" MB, any batch, any size in multiples of 16")
    assert "for batches of 1 and 3 random images of 64 x 64, 64 x 96, 112 x 80 differ" in compared
    code, printed, _ = run(capsys, "test_vit", tmp_path / "c.pt2", "--dynamic-size", "--json")
    assert code == 0 and json.loads(printed)["inputs"]["dynamic_size"] is True


def test_stock_models_have_timms_preprocessing(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"class é{index}\n" for index in range(1000)))
    words = ["test_vit", tmp_path / "a.pt2", "--classes", tmp_path / "names.txt"]
    assert run(capsys, *words)[0] == 0
    about, _ = entry(tmp_path / "a.pt2")
    assert (about.input_size, about.crop_pct) == ((3, 160, 160), 0.95) and about.class_names[3] == "class é3"


def test_a_run_and_its_weights_give_the_same_outputs(capsys: Capture, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train = ["train", "plain", "--data", "digits", "--recipe", "digits", "--device", "cpu", "--epochs", "1",
             "--warmup-epochs", "0", "--mixer", "vit_relpos", "--crop-pct", "1", "--out", str(folder)]  # fmt: skip
    assert cli.main(train) == 0
    capsys.readouterr()
    code, printed, _ = run(capsys, folder, tmp_path / "run.onnx")
    assert code == 0 and printed.startswith(f"{folder}: vit_relpos (weights after epoch 1)")
    assert run(capsys, folder / "weights.safetensors", tmp_path / "file.pt2")[0] == 0
    about, _ = entry(tmp_path / "run.onnx")
    assert (about.input_size, about.white, about.crop_pct) == ((1, 8, 8), 16, 1) and len(about.class_names) == 10
    images = torch.randn(4, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "run.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": images.numpy()})
    program = torch.export.load(tmp_path / "file.pt2").module()
    assert torch.allclose(torch.from_numpy(outputs), program(images), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(kernelbank.load(folder / "weights.safetensors")(images), program(images), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_kb_tes", "a.pt2"], "unknown model 'vit_kb_tes'; did you mean"),
        ([OURS, "a.onx"], "unknown format '.onx'; did you mean '.onnx'?"),
        ([OURS, "a\x1b.pt3"], r"invalid output a\x1b.pt3: unknown format"),
        ([OURS, "a.pt2", "--mixer", "vit kernel=full"], "invalid kernel=full"),
        ([OURS, "a.pt2", "--half", "int8"], "int8"),
        ([OURS, "a.pt2", "--opset", "18"], "invalid opset=18"),
        ([OURS, "a.onnx", "--opset", "9"], "invalid opset=9; expected 18 to 23"),
        ([OURS, "a.pt2", "--img-size", "0", "8"], "invalid --img-size=(0, 8)"),
        ([OURS, "a.pt2", "--classes", "none.txt"], "invalid classes=none.txt: no such file"),
        ([OURS, "taken.pt2"], "invalid output taken.pt2: it exists; expected another name, or overwrite"),
        (["taken.pt2", "a.onnx"], "taken.pt2"),
        ([OURS], "OUT"),
        ([OURS, "a.onnx", "--form", "conv"], "invalid form=conv for batches of any size"),
        ([OURS, "a.onnx", "--form", "convs"], "convs"),
        ([OURS, "a.onnx", "--batch", "0"], "invalid --batch=0; expected a whole number >= 1"),
        (
            [OURS, "a.onnx", "--dynamic-size", "--mixer", "vit_relpos"],
            "blocks.0.attn, vit_relpos, has a relative table",
        ),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.pt2").write_text("mine")
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.pt2"]


# ---- the page --------------------------------------------------------------------------------------------


def test_the_example_runs_without_torch(capsys: Capture, tmp_path: Path) -> None:
    """As documented: at most 25 lines; onnxruntime, numpy and Pillow; the outputs that timm's transform gives."""
    assert len(EXAMPLE.strip().splitlines()) <= 25
    assert set(re.findall(r"^(?:import|from) (\w+)", EXAMPLE, re.MULTILINE)) == {
        "json",
        "sys",
        "numpy",
        "onnxruntime",
        "PIL",
    }
    assert run(capsys, OURS, tmp_path / "a.onnx")[0] == 0
    pixels = np.random.RandomState(0).randint(0, 256, (5, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((280, 200), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    (tmp_path / "example.py").write_text(EXAMPLE + "assert 'torch' not in sys.modules\n")
    command = [sys.executable, "example.py", "a.onnx", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line.split(" ", 1) for line in done.stdout.splitlines()]
    about, _ = entry(tmp_path / "a.onnx")
    transform = create_transform(about.input_size, mean=about.mean, std=about.std, crop_pct=about.crop_pct,
                                 interpolation=about.interpolation)  # fmt: skip
    image = Image.open(tmp_path / "a.png")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"images": transform(image)[None].numpy()})
    by_name = dict(zip(about.class_names, outputs[0], strict=True))
    assert len(printed) == 5 and printed[0][1] == max(by_name, key=lambda name: by_name[name])
    assert all(abs(float(value) - by_name[name]) < 0.01 for value, name in printed)


def test_the_snippet_prints_what_its_comment_says(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPET, "export.md", "exec"), {})
    assert capsys.readouterr().out == "True\n" and (tmp_path / "model.pt2").exists()


def test_the_printed_lines_of_the_page_are_those_of_the_command(capsys: Capture, tmp_path: Path) -> None:
    shown = re.findall(r"^\$ kernelbank export (\S+) (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    ((name, file, lines),) = shown
    _, printed, _ = run(capsys, name, tmp_path / file)

    def words(text: str) -> str:
        return re.sub(r"\d\.\de-\d\d", "N", text)

    assert words(printed.replace(f"{tmp_path}/", "")) == words(lines)
