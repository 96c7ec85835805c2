"""Tables and figures from records alone, and one clear line for options that cannot be used."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kernelbank.cli import main
from kernelbank.records import CodeIdentity, DataIdentity, EpochResult, MachineIdentity, RunRecord
from kernelbank.report.study_figure import _spread, draw
from kernelbank.report.study_table import document, markdown, mean_curve, tabulate
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.progress import _Tally, reporter
from kernelbank.studies.run import Run
from kernelbank.studies.runner import EpochDone, Note, RunDone
from kernelbank.studies.study import changed, named_host
from kernelbank.train.recipes import digits_recipe
from kernelbank.zoo import SMALL

STUDY = STUDIES["softmax"]()


def record(row: str, seed: int, top1: list[float], test: float | None, failure: str | None = None) -> RunRecord:
    return RunRecord(
        study="softmax", row=row, model=changed(named_host("plain"), STUDY.row(row)), recipe={"epochs": len(top1)},
        data=DataIdentity("digits", "0", 1077, 360, 360), seed=seed, code=CodeIdentity.here(),
        machine=MachineIdentity.here(1), params=58500, macs=940_000,
        epochs=tuple(EpochResult(1.0, 1.0, value, 0.1) for value in top1), test_loss=test, test_top1=test,
        failure=failure,
    )  # fmt: skip


RECORDS = [
    record("softmax", 0, [50.0, 80.0, 90.0], 90.0),
    record("softmax", 1, [50.0, 82.0, 92.0], 94.0),
    record("layernorm", 0, [70.0, 94.0, 90.0], 95.0),
    record("layernorm", 1, [70.0, 88.0, 89.0], 96.0),
    record("relu", 0, [60.0, 80.0, 90.9], 91.0),
    record("relu", 1, [10.0], None, "training loss nan at epoch 2"),
    record("exp", 0, [], None, "training loss inf at epoch 1"),
]


def test_the_table_is_read_from_records() -> None:
    rows = {row.row: row for row in tabulate(STUDY, RECORDS)}
    assert list(rows) == ["softmax", "relu", "exp", "layernorm"]  # the study's order
    assert (rows["softmax"].test_top1, rows["softmax"].epochs_to_baseline) == (92.0, 3)
    assert rows["softmax"].test_top1_sd == pytest.approx(8**0.5) and rows["softmax"].changed == ()
    assert (rows["layernorm"].epochs_to_baseline, rows["layernorm"].val_top1) == (2, 89.5)
    assert rows["layernorm"].roles == ("normalisation", "communication")
    assert rows["relu"].test_top1 == 91.0 and rows["relu"].test_top1_sd is None
    assert rows["relu"].epochs_to_baseline is None and rows["relu"].seeds == (0, 1)
    assert rows["exp"].test_top1 is None and rows["exp"].val_top1 is None
    assert rows["exp"].failures == ("seed 0: training loss inf at epoch 1",)
    assert mean_curve(RECORDS[:2]) == [50.0, 81.0, 91.0]


def test_markdown_shows_divergence_and_gives_no_verdicts() -> None:
    text = markdown(STUDY, RECORDS)
    assert "| softmax (baseline) | - | NCL | 58.5 K | 0.94 M | 92.0 ± 2.8 | 3 |" in text
    assert "| relu | activation=relu,count | ··L | 58.5 K | 0.94 M | 91.0 (1 of 2 diverged) | - |" in text
    assert "| exp | activation=exp,count | ··L | 58.5 K | 0.94 M | diverged | - |" in text
    assert "- diverged: plain exp, seed 0: training loss inf at epoch 1" in text
    assert "demonstration on digits: no verdicts (360 test images: a standard error of 1.4 points at 93 %" in text
    assert "another state of the code" not in text


def test_without_a_baseline_nothing_is_compared() -> None:
    rows = tabulate(STUDY, RECORDS[2:4])
    assert rows[0].epochs_to_baseline is None and rows[0].changed == (("activation", "layernorm,count"),)
    assert "the baseline 'softmax' is not among the rows" in markdown(STUDY, RECORDS[2:4])
    # nothing to give a standard error of
    assert "- demonstration on digits: no verdicts (360 test images)" in markdown(STUDY, RECORDS[-1:])


def test_the_document_is_plain_json() -> None:
    plain = json.loads(json.dumps(document(STUDY, RECORDS), allow_nan=False))
    assert plain["rows"][3]["changed"] == {"activation": "layernorm,count"} and plain["records"] == 7


@pytest.mark.parametrize("chosen", [RECORDS, RECORDS[:1], RECORDS[-1:]])
def test_the_figure_takes_any_records(tmp_path: Path, chosen: list[RunRecord]) -> None:
    draw(STUDY, chosen, tmp_path / "study.png")
    assert [path.name for path in tmp_path.iterdir()] == ["study.png"]


def test_labels_are_spread_but_not_moved_without_need() -> None:
    assert _spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert _spread([0.5, 0.5, 0.5, 0.9], 0.1) == pytest.approx([0.4, 0.5, 0.6, 0.9])
    assert _spread([0.4, 0.5, 0.5], 0.1) == pytest.approx([11 / 30, 14 / 30, 17 / 30])
    assert _spread([], 0.1) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_runs_epochs_and_notes(terminal: bool) -> None:
    out, recipe = io.StringIO(), digits_recipe(3)
    run = Run("softmax", "relu", SMALL["plain"], recipe, RECORDS[0].data, 0)
    with reporter(Console(file=out, force_terminal=terminal, width=100), [run, replace(run, seed=1)]) as sink:
        for epoch in RECORDS[4].epochs:
            sink(EpochDone(run, epoch))
        sink(Note("a [file] was set aside"))
        sink(RunDone(run, RECORDS[4]))
        sink(RunDone(replace(run, seed=1), RECORDS[5]))
    text = out.getvalue()
    assert "a [file] was set aside" in text
    if not terminal:
        assert "[1/2] plain relu seed 0: validation 90.9, test 91.0 (0.3 s); 0 s left" in text
        assert "[2/2] plain relu seed 1: diverged: training loss nan at epoch 2; 0 s left" in text


def test_epochs_from_a_checkpoint_say_nothing_about_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0])
    monkeypatch.setattr("kernelbank.studies.progress.monotonic", lambda: next(now))
    run, tally = Run("softmax", "relu", SMALL["plain"], digits_recipe(10), RECORDS[0].data, 0), _Tally(1, 10)
    for _ in range(8):
        tally.count(EpochDone(run, RECORDS[0].epochs[0], restored=True))
    assert tally.time_left == ""
    tally.count(EpochDone(run, RECORDS[0].epochs[0]))
    assert tally.time_left == "10 s left"  # one epoch in 10 s, one to go


def test_the_position_row_says_what_it_is() -> None:
    what = STUDIES["depthwise"]().row("position").what
    assert "over the whole grid of every stage" in what and "drawn and biased as a convolution" in what


@pytest.mark.parametrize("missing", ["timm", "sklearn", "matplotlib", "torchvision"])
def test_a_missing_extra_is_one_line(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["study", "softmax", "--out", str(tmp_path / "out")]) == 2
    said = f"kernelbank: error: study needs {missing}: pip install 'kernelbank[train,report]'\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["softmax", "--rows", "relu", "layernrm"],
         "--rows: unknown row 'layernrm' of study softmax; did you mean 'layernorm'?; expected softmax, identity,"),
        (["softmax", "--rows", "relu", "relu"], "--rows: relu is given twice"),
        (["softmax", "--seeds", "0", "1", "0"], "--seeds: 0 is given twice"),
        (["softmax", "--seeds", "-1"], "invalid --seeds=-1; expected 0 to"),
        (["softmax", "--epochs", "0"], "recipe: invalid epochs=0; expected a whole number >= 1"),
        (["softmax", "--jobs", "0"], "invalid --jobs=0; expected a whole number >= 1"),
        (["softmax", "--shard", "5/4"], "invalid --shard=5/4; expected K/N with 1 <= K <= N"),
        (["softmax", "--design", "cifar"], "unknown design 'cifar'; did you mean 'cifar10'"),
        (["softmax", "--quick", "--design", "cifar10"], "--quick and --design cifar10 exclude each other"),
        (["softmax", "--data", "{file}"], "--recipe is missing; expected one of"),
        (["softmax", "--data", "{file}", "--recipe", "paper"], "--models is missing"),
        (["softmax", "--data", "{file}", "--recipe", "paper", "--models", "plain", "--warmup-epochs", "9", "--epochs",
          "8"], "invalid warmup_epochs=9; expected less than epochs=8"),
        (["softmax", "--model-args", "depth"], "invalid --model-args 'depth'; expected NAME=VALUE"),
        (["softmax", "--out", "{file}"], "cannot be written to"),
        (["softmax", "--out", ""], "invalid --out=''; expected the name of a folder"),
        (["softmax", "--rows"], "invalid --rows without values"),
        (["softmax", "--seeds"], "invalid --seeds without values"),
        (["softmax", "--seeds", "a"], "--seeds: invalid value 'a'; expected INT [INT ...]\n"),
        (["softmx"], "softmx"),
        ([], ""),
        (["softmax", "--models", "flat"], "unknown model 'flat'"),
        (["softmax", "--design", "cifar10"], "--data is missing"),
        (["softmax", "--epoch", "3"], "--epochs"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    words = [word.format(file=tmp_path / "file") for word in words]
    assert main(["study", *words]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and message in complaint and complaint.startswith("kernelbank")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing ran, nothing was made


def test_the_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        stop.value.code == 0
        and f"The number of passes over the training images. (default: {digits_recipe().epochs})" in text
    )
