"""``kernelbank report``: sections, rows and the JSON document from records, and one clear line for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from studies.simulated import CODE, DATA, pairs, trained
from studies.test_trained_run import saved

from kernelbank.cli import main
from kernelbank.report.page.verdicts import finding_view, interval_bar
from kernelbank.report.plots import by_epoch, pareto_front, plots
from kernelbank.report.sections import evaluated, sections
from kernelbank.report.summary import summarise
from kernelbank.studies.claims import ACCURACY, EPOCHS, ClaimPart, versus
from kernelbank.studies.verdicts import Finding


def folder_of(path: Path, seeds: int = 3) -> Path:
    """A study of softmax and ReLU, ReLU better by two points or a little more."""
    for seed in range(seeds):
        for row, top1 in (("softmax", 70.0), ("relu", 72.0 + seed / 10)):
            saved(path / "records" / f"{row}-{seed}.json", row, seed=seed, test_top1=top1)
    return path


def lines_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["report", *map(str, argv)]) == 0
    return capsys.readouterr().out


# ---- rows ------------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    rows = {row.row: row for row in summarise(pairs([2.0, 2.5, 1.5]))}
    assert list(rows) == ["softmax", "relu"]
    assert rows["softmax"].difference is None and rows["softmax"].is_baseline
    relu = rows["relu"]
    assert relu.test is not None and (relu.test.mean, relu.test.deviation, relu.test.count) == (82.0, 0.5, 3)
    assert relu.difference is not None and relu.difference.mean == 2.0 and relu.difference.count == 3
    assert (relu.diverged, relu.unfinished, relu.epoch_seconds) == (0, 0, 1.0)


def test_diverged_and_unfinished_runs_are_counted_and_not_averaged() -> None:
    runs = [*pairs([2.0]), trained("relu", 1, (40.0,), failure="nan", epochs=3), trained("relu", 2, (9.0,), epochs=3)]
    row = summarise(runs)[1]
    assert (row.diverged, row.unfinished, len(row.finished)) == (1, 1, 1)
    assert row.test is not None and (row.test.mean, row.test.deviation) == (82.0, None)
    notes = sections(runs)[0].notes
    assert "Diverged: softmax, plain, relu, seed 1: nan" in notes
    assert any(note.startswith("In progress: softmax, plain, relu, seed 2: 1 of 3 epochs") for note in notes)
    assert any(note.startswith("Missing seeds in softmax, plain: softmax without 1, 2.") for note in notes)


def test_rates_are_rows_of_their_own() -> None:
    rows = summarise([*pairs([1.0]), trained("relu", 0, lr=2e-3)])
    assert [(row.row, row.rate) for row in rows] == [("softmax", 1e-3), ("relu", 1e-3), ("relu", 2e-3)]
    assert len({row.key for row in rows}) == 3 and rows[2].difference is None  # softmax has no run at this rate


# ---- sections --------------------------------------------------------------------------------------------


def test_unequal_recipes_are_sections_of_their_own_and_named() -> None:
    short = [replace(run, recipe={**run.recipe, "mixup": 0.8}) for run in pairs([2.0, 2.1])]
    found = sections([*pairs([2.0, 2.1, 1.9]), *short])
    assert [section.title for section in found] == ["simulated, 3 epochs, mixup None", "simulated, 3 epochs, mixup 0.8"]
    other = [replace(run, data=replace(DATA, name="other", sha256="1")) for run in pairs([1.0])]
    assert [section.title for section in sections([*pairs([1.0, 1.1]), *other])] == [
        "simulated, 3 epochs", "other, 3 epochs"]  # fmt: skip


def test_states_of_the_code_are_named() -> None:
    runs = pairs([2.0, 2.1, 1.9])
    mixed = [*runs[:5], replace(runs[5], code=replace(CODE, sources="d" * 64))]
    assert not sections(runs)[0].notes
    (note,) = sections(mixed)[0].notes
    assert "2 states of the code" in note and "dddddddddd (1 run)" in note and "cccccccccc (5 runs)" in note


def test_best_rates_have_verdicts_where_rates_were_searched() -> None:
    runs = pairs([2.0, 2.1, 1.9])
    assert sections(runs)[0].best is None
    searched = [trained(row, 200, (70.0,) * 3, lr=lr) for row in ("softmax", "relu") for lr in (1e-3, 2e-3)]
    best = sections([*runs, *searched])[0].best
    assert best is not None and {verdict.claim.id for verdict in evaluated(best)} == {"C3", "C4"}
    used = [file for verdict in best for finding in verdict.findings for file in finding.runs]
    assert used and not any("-200-" in file for file in used)


# ---- figures ---------------------------------------------------------------------------------------------


def test_the_pareto_front_by_hand() -> None:
    points = [(1.0, 70.0), (2.0, 69.0), (2.0, 75.0), (3.0, 75.0), (4.0, 76.0)]
    assert pareto_front(points) == ((1.0, 70.0), (2.0, 75.0), (4.0, 76.0))


def test_figures_show_what_differs() -> None:
    rows = summarise(pairs([2.0, 2.1, 1.9]))
    assert [plot.name for plot in plots(rows)] == ["curves"]  # cost and time are the same
    cheaper = summarise(pairs([2.0, 2.1, 1.9], macs=500, seconds=0.5))
    assert [plot.name for plot in plots(cheaper)] == ["curves", "macs", "time"]
    names = {trace.get("name") for trace in json.loads(plots(rows)[0].figure)["data"]}
    assert {"softmax", "relu"} <= names
    assert plots(summarise([trained("relu", 0, (), epochs=3)])) == ()
    assert by_epoch([trained("a", 0, (1.0, 2.0)), trained("a", 1, (3.0,), failure="nan", epochs=2)]) == [(1.0,), (2.0,)]


def test_the_drawing_of_an_interval() -> None:
    part = ClaimPart(versus("relu", "softmax"), ACCURACY, "equivalence")
    finding = Finding("plain", part, part.contrast, "undecided", effect=0.5, low=-1.0, high=2.0, seeds=(0, 1))
    bar = interval_bar(finding)
    assert bar is not None and bar["zero"] == 75.0 and bar["low"] < bar["margins"][1] < bar["high"]
    assert bar["low"] == bar["margins"][0] and finding_view(finding, "x", str)["range"] == "-1.00 to +2.00"
    fewer = replace(finding, part=ClaimPart(part.contrast, EPOCHS, "superiority"))
    bar = interval_bar(fewer)
    assert bar is not None and bar["margins"][0] < bar["zero"]  # fewer epochs are better
    assert interval_bar(replace(finding, low=None)) is None


# ---- the command -----------------------------------------------------------------------------------------


def test_the_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(lines_of(capsys, folder_of(tmp_path), "--json"))
    (setting,) = document["settings"]
    verdicts = {verdict["id"]: verdict for verdict in setting["verdicts"]}
    relu, layernorm = verdicts["C4"]["findings"]
    assert (relu["decision"], relu["seeds"], relu["unit"]) == ("holds", [0, 1, 2], "points")
    assert relu["effect"] == pytest.approx(2.1) and relu["low"] < 2.1 < relu["high"]
    assert relu["runs"] == [f"records/{row}-{seed}.json" for row in ("relu", "softmax") for seed in range(3)]
    assert layernorm["reason"] == "missing rows: layernorm" and verdicts["C4"]["decision"] == "not evaluated"
    assert [row["row"] for row in setting["rows"]] == ["softmax", "relu"]
    assert (tmp_path / "report.html").exists()


def test_verdicts_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = lines_of(capsys, folder_of(tmp_path), "--out", tmp_path / "a.html")
    assert "Verdicts hold for this scale only: simulated with 45,000 training and 50,000 test images, 3 epochs" in text
    line = next(line for line in text.splitlines() if "non-inferiority" in line and "relu" in line)
    assert line.split()[-1] == "holds" and "+2.10 points" in line
    assert "missing rows: layernorm" in text and text.rstrip().endswith("a.html")


def test_damaged_records_are_named_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path)
    (tmp_path / "records" / "zz\x1b[31m.json").write_text("{")
    text = lines_of(capsys, tmp_path)
    assert "Not used: records/zz\\x1b[31m.json: it is not a run record" in text and "\x1b" not in text
    page = (tmp_path / "report.html").read_text()
    assert "zz\\x1b[31m.json" in page and "\x1b[31m" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "FOLDER"),
        (["nowhere"], "invalid FOLDER=nowhere; expected a folder with run records"),
        (["."], "it holds no run record; expected the folder of a study or of training runs"),
        ([".", "--out", "report.pdf"], "invalid --out='report.pdf'; expected a name that ends in .html"),
        (["full", "--out", "nowhere/a.html"], "invalid --out=nowhere/a.html; expected a file in a folder that exists"),
        (["full", "--jsn"], "unknown option --jsn; did you mean '--json'?"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if "full" in words:
        folder_of(tmp_path / "empty" / "full", seeds=1)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_names_from_records_are_escaped_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row's name is text on the page, in its figures and on the terminal."""
    folder_of(tmp_path)
    path = tmp_path / "records" / "x.json"
    replace(saved(path), study="train", row="</script><img src=x>[red]\x1b[31m").save(path)
    lines_of(capsys, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x>" not in page and "&lt;img src=x&gt;" in page and "\x1b[31m" not in page
