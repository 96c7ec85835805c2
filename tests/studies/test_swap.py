"""Runs that start from the weights of another run: what they start from, in which order, and what is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernelbank.cli import main
from kernelbank.data.load import load
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.records import RunRecord
from kernelbank.studies import run as runs
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.hosts import with_rows
from kernelbank.studies.run import Conditions, Run, fine_tuning_recipe, grid
from kernelbank.studies.runner import finished, make_folders
from kernelbank.studies.study import FineTuning, Study, StudyRow
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import evaluate
from kernelbank.train.model import describe
from kernelbank.train.recipes import cifar10, digits_recipe
from kernelbank.train.request import DataOptions
from kernelbank.train.session import Hooks
from kernelbank.weights.load import load as load_model

CONDITIONS = Conditions(source=DataOptions(data="digits"), hardware=Hardware(device="cpu"))
WORDS = ["study", "swap", "--models", "plain", "--rows", "relu-1", "--seeds", "0", "1", "--epochs", "2", "--jobs", "1"]


def records(folder: Path) -> dict[tuple[str, int], RunRecord]:
    found = [RunRecord.load(path) for path in (folder / "records").glob("*.json")]
    return {(record.row, record.seed): record for record in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row, two seeds: softmax, from which it starts, runs as well."""
    folder = tmp_path_factory.mktemp("swap")
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def test_a_row_starts_from_the_trained_weights_of_the_same_seed(whole: Path) -> None:
    found = records(whole)
    assert set(found) == {(row, seed) for row in ("softmax", "relu-1") for seed in (0, 1)}
    for seed in (0, 1):
        softmax, relu = found["softmax", seed], found["relu-1", seed]
        assert softmax.start is None and softmax.start_top1 is None and len(softmax.epochs) == 2
        assert relu.start is not None and relu.start.startswith(f"swap-plain-softmax-seed{seed}-")
        assert len(relu.epochs) == 1 and relu.recipe["lr"] == softmax.recipe["lr"] / 4
        model = load_model(whole / "weights" / f"{relu.start}.safetensors")
        data = load("digits")
        assert evaluate(model, data.test).top1 == pytest.approx(softmax.test_top1)
        assert evaluate(replace_mixers(model, str(relu.mixer)), data.val).top1 == pytest.approx(relu.start_top1)
    text = (whole / "table.md").read_text()
    start = sum(found["relu-1", seed].start_top1 or 0 for seed in (0, 1)) / 2
    assert f"plain relu-1: from the weights of softmax, 1 more with lr 0.001; validation top-1 {start:.1f}" in text


def test_nothing_is_repeated_and_lost_weights_are_made_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (whole / "records").iterdir()}
    weights = {path.name: path.read_bytes() for path in (whole / "weights").iterdir()}
    (whole / "weights" / next(iter(weights))).unlink()
    assert main([*WORDS, "--out", str(whole)]) == 0  # no missing run needs them
    assert "4 finished before" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (whole / "records").iterdir()} == before
    for path in (whole / "records").glob("*relu-1*"):
        path.unlink()
    assert main([*WORDS, "--out", str(whole)]) == 0
    told = capsys.readouterr().err
    assert "its weights, from which others start, are not in the folder; the run is repeated" in told
    assert "4 runs, 1 finished before" in told
    assert {path.name: path.read_bytes() for path in (whole / "weights").iterdir()} == weights
    again = {path.name: RunRecord.load(path) for path in (whole / "records").iterdir()}
    old = {name: RunRecord.from_document(json.loads(text)) for name, text in before.items()}
    assert {name: record.test_top1 for name, record in again.items()} == {n: r.test_top1 for n, r in old.items()}
    assert {name: record.start_top1 for name, record in again.items()} == {n: r.start_top1 for n, r in old.items()}


def test_a_shard_runs_what_starts_from_its_own(tmp_path: Path) -> None:
    assert main([*WORDS, "--out", str(tmp_path), "--shard", "2/2"]) == 0
    assert set(records(tmp_path)) == {("softmax", 1), ("relu-1", 1)}
    assert main([*WORDS, "--out", str(tmp_path), "--shard", "1/2"]) == 0
    assert len(records(tmp_path)) == 4


def some_run(host: str = "plain", recipe_epochs: int = 1) -> Run:
    study = STUDIES["swap"]()
    models = with_rows(runs_host(host), "", [study.row(label) for label in ("softmax", "relu-1")])
    data = load("digits").identity
    return grid(study, hosts=[(models, data)], seeds=(0,), recipe=digits_recipe(recipe_epochs))[1]


def runs_host(name: str) -> ModelSpec:
    if name == "plain":
        return describe("plain", in_chans=1, num_classes=10)
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 2}
    return describe(name, img_size=(8, 8), in_chans=1, num_classes=10, arguments=small)


def test_a_stock_model_starts_from_trained_weights(tmp_path: Path) -> None:
    run = some_run("vit_tiny_patch16_224")
    assert run.start is not None
    make_folders(tmp_path)
    runs.execute(run.start, CONDITIONS, tmp_path, Hooks())
    model = runs.started(run, run.start, tmp_path)
    donor = load_model(run.start.weights_path(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in donor.state_dict().items())
    assert runs.execute(run, CONDITIONS, tmp_path, Hooks()).start_top1 is not None


def test_a_run_without_weights_to_start_from_is_an_error_or_a_failure(tmp_path: Path) -> None:
    run = some_run()
    assert run.start is not None
    make_folders(tmp_path)
    with pytest.raises(InputError, match=r"start: there is no .*, from which plain relu-1 seed 0 starts; expected"):
        runs.execute(run, CONDITIONS, tmp_path, Hooks())
    record = runs.execute(run.start, CONDITIONS, tmp_path, Hooks())
    replace(record, failure="training loss nan").save(run.start.record_path(tmp_path))
    failed = runs.execute(run, CONDITIONS, tmp_path, Hooks())
    assert failed.failure == "plain softmax seed 0, from whose weights it starts, diverged: training loss nan"
    assert finished([run], tmp_path, print) == {run: failed} and not failed.epochs


def test_the_start_is_part_of_what_a_run_is() -> None:
    run = some_run()
    assert run.start is not None and run.start.keep and not run.keep
    other = replace(run, start=replace(run.start, recipe=digits_recipe(2)))
    assert len({run.key, other.key, replace(run, start=None).key}) == 3
    assert replace(run.start, keep=False) == run.start and replace(run.start, keep=False).key == run.start.key


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (5, 0), (10, 1), (30, 3)])
def test_fine_tuning_has_lower_rates_and_the_same_share_of_warm_up(epochs: int, warmup: int) -> None:
    recipe = cifar10().recipe
    tuned = fine_tuning_recipe(recipe, epochs)
    assert (tuned.epochs, tuned.warmup_epochs, tuned.lr) == (epochs, warmup, recipe.lr / 4)


def test_the_designs_hold_what_is_compared() -> None:
    study = STUDIES["swap"]()
    assert [row.label for row in study.with_starts(["relu-5"])] == ["softmax", "relu-5"]
    for design in DESIGNS.values():
        labels = design.rows.get("swap", study.labels)
        assert {row.label for row in study.with_starts(labels)} == set(labels)
        for label in labels:
            assert study.row(label).fine_tuning is None or label.rpartition("-")[0] in labels


def test_a_row_must_start_from_a_row_that_is_trained_from_scratch() -> None:
    first = StudyRow("a", "", "position=none")
    second = StudyRow("b", "", "position=none", fine_tuning=FineTuning("a", 1))
    for row in ("b", "c"):
        third = StudyRow("d", "", "position=none", fine_tuning=FineTuning(row, 1))
        with pytest.raises(ValueError, match="row d must start from a row that is trained from scratch"):
            Study(name="x", title="", questions=(), baseline="a", rows=(first, second, third))
