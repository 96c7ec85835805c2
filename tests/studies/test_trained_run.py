"""Run records as plain values: measures, settings and learning rates."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from studies.simulated import CODE, DATA, MACHINE, the, trained

from kernelbank.errors import InputError
from kernelbank.records import EpochResult, RunRecord
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.claims import (
    EPOCHS,
)
from kernelbank.studies.measures import (
    MEASURES,
    area_under_curve,
    epochs_to_target,
    final_accuracy,
    validation_target,
)
from kernelbank.studies.study import changed, named_host
from kernelbank.studies.trained_run import at_best_rate, at_shared_rate, by_setting, read_folder, trained_run
from kernelbank.train.runs import RunFolder


def test_measures_by_hand() -> None:
    run = trained("relu", 0, (40.0, 60.0, 80.0), test=79.0)
    assert (final_accuracy(run), area_under_curve(run)) == (79.0, 60.0)
    assert [epochs_to_target(run, target) for target in (40.0, 41.0, 80.0, 81.0)] == [1.0, 2.0, 3.0, 3.0]
    assert MEASURES["params"](run, 0.0) == pytest.approx(100 * math.log(1000))


def test_a_run_that_diverged_has_the_accuracy_of_chance() -> None:
    run = trained("relu", 0, (40.0, 85.0), failure="training loss nan at epoch 3", epochs=4)
    assert final_accuracy(run) == 10.0 and area_under_curve(run) == (40 + 85 + 10 + 10) / 4
    assert epochs_to_target(run, 80.0) == 4.0


def test_the_target_comes_from_seeds_of_softmax_alone() -> None:
    runs = [trained("softmax", seed, (50.0, 70.0 + seed)) for seed in range(5)]
    runs += [trained("relu", seed, (70.0, 75.0)) for seed in range(3)]
    assert validation_target(runs) == (72.5, frozenset({3, 4}))
    finding = the(runs, EPOCHS)
    assert (finding.target, finding.seeds, finding.effect) == (72.5, (0, 1, 2), 0.0)
    assert not any("-3-" in file or "-4-" in file for file in finding.runs)
    # without such a seed the claim is not evaluated, and softmax alone has nothing to compare
    assert validation_target(runs[:3] + runs[5:]) == (None, frozenset())
    assert validation_target(runs[:5]) == (None, frozenset())
    missing = the(runs[:3] + runs[5:], EPOCHS)
    assert missing.decision == "not evaluated" and "to fix the target" in missing.reason


def test_settings_are_data_and_recipe_without_the_rate() -> None:
    runs = [trained(seed=0), trained(seed=1, lr=2e-3), trained(seed=2, data=replace(DATA, sha256="1"))]
    runs.append(trained(curve=(1.0,), seed=3))  # another number of epochs
    assert [[run.seed for run in setting] for setting in by_setting(runs)] == [[0, 1], [2], [3]]


def test_shared_and_best_rates() -> None:
    """Each row's rate is chosen on seed 9, which takes no part in the comparison."""
    accuracy = {("relu", 1e-3): 70.0, ("relu", 2e-3): 75.0, ("softmax", 1e-3): 72.0, ("softmax", 2e-3): 60.0}
    runs = [trained(row, 9, (value,), lr=lr) for (row, lr), value in accuracy.items()]
    runs += [trained(row, seed, (accuracy[row, lr],), lr=lr) for row, lr in [("relu", 2e-3), ("softmax", 1e-3)]
             for seed in (0, 1)]  # fmt: skip
    runs += [trained("relu", seed, (70.0,), lr=1e-3) for seed in (0, 1)]
    best = {(run.row, run.rate, run.seed) for run in at_best_rate(runs)}
    assert best == {("relu", 2e-3, 0), ("relu", 2e-3, 1), ("softmax", 1e-3, 0), ("softmax", 1e-3, 1)}
    assert {run.rate for run in at_shared_rate(runs)} == {1e-3}
    # a search without a seed of its own chooses nothing
    assert at_best_rate([trained("relu", 0), trained("relu", 1, lr=2e-3)]) == ()
    assert len(at_best_rate([trained("relu", 0), trained("softmax", 0)])) == 2


# ---- folders ---------------------------------------------------------------------------------------------


def saved(path: Path, row: str = "relu", **fields: Any) -> RunRecord:
    """A run record of three epochs on the disk."""
    model = changed(named_host("plain"), STUDIES["softmax"]().row(row))
    record = RunRecord(
        study="softmax", row=row, model=model, recipe={"epochs": 3, "lr": 1e-3},
        data=DATA, seed=0, code=CODE, machine=MACHINE, params=10, macs=20,
        epochs=tuple(EpochResult(1.0, 1.0, value, 0.5) for value in (50.0, 60.0, 70.0)), test_top1=69.0,
    )  # fmt: skip
    record = replace(record, **fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    record.save(path)
    return record


def test_a_run_record_becomes_numbers(tmp_path: Path) -> None:
    record = saved(tmp_path / "records" / "a.json")
    ((run,), aside) = read_folder(tmp_path)
    assert aside == () and run == trained_run(record, "records/a.json")
    assert (run.curve, run.test_top1, run.seconds, run.epochs) == ((50.0, 60.0, 70.0), 69.0, (0.5,) * 3, 3)
    assert (run.classes, run.windowed, run.finished, run.rate) == (10, False, True, 1e-3)
    assert run.roles == ("non-linearity",) and run.epoch_seconds == 0.5


def test_what_cannot_be_used_is_set_aside_with_a_reason(tmp_path: Path) -> None:
    saved(tmp_path / "records" / "a.json")
    saved(tmp_path / "records" / "b.json", code=replace(CODE, sources="0" * 64))
    (tmp_path / "records" / "c.json").write_text("{")
    (tmp_path / "records" / "d.json").write_text("[]")
    text = (tmp_path / "records" / "a.json").read_text()
    (tmp_path / "records" / "e.json").write_text(text.replace('"params": 10', '"params": "ten"'))
    (tmp_path / "records" / "f.json").write_bytes(b"\xff")
    (tmp_path / "table.json").write_text('{"rows": []}')  # of another kind: not looked at
    (tmp_path / "cut.json").write_text("{")
    runs, aside = read_folder(tmp_path)
    assert [run.file for run in runs] == ["records/a.json"]
    reasons = {item.file: item.reason for item in aside}
    assert list(reasons) == [f"records/{name}.json" for name in "bcdef"]
    assert reasons["records/b.json"].endswith("the same run as records/a.json, made by another state of the code")
    assert "expected a JSON object" in reasons["records/d.json"]
    assert "record.params='ten'; expected int" in reasons["records/e.json"]


def test_folders_without_run_records_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"invalid FOLDER=.*nowhere; expected a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it holds no run record; expected the folder of a study"):
        read_folder(tmp_path)
    saved(tmp_path / "records" / "a.json")
    (tmp_path / "records" / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"no run record; 1 damaged: records/a.json: it is not a run record"):
        read_folder(tmp_path)


def test_a_run_in_progress_is_read(tmp_path: Path) -> None:
    record = saved(tmp_path / "one" / "record.json", study="train")
    folder = RunFolder(tmp_path / "one")
    folder.write_config({
        "id": "1", "model": {}, "start": {}, "recipe": {}, "seed": 0, "data": {}, "options": {},
        "record": replace(record, epochs=(), test_top1=None).to_document(),
    })  # fmt: skip
    folder.log.write_text(json.dumps({"event": "epoch", "epoch": 1, **asdict(record.epochs[0])}) + "\n{")
    assert read_folder(tmp_path)[0][0].finished  # the run record of a finished run is used
    folder.record.unlink()
    ((run,), aside) = read_folder(tmp_path)
    assert (run.curve, run.finished, run.diverged, run.file) == ((50.0,), False, False, "one/run.json") and not aside
    folder.config.write_text("{}")
    saved(tmp_path / "records" / "a.json")
    assert "run_version=None" in read_folder(tmp_path)[1][0].reason


def test_the_records_of_the_repository_are_read() -> None:
    root = Path(__file__).parents[2] / "records"
    runs, aside = read_folder(root)
    assert not aside and {run.study for run in runs} >= {"softmax", "depthwise", "assumptions"}
    assert all(run.finished for run in runs if run.study != "train")
