"""Comparing runs: groups by what they are, intervals over seeds, honest notes."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import stdev

import pytest

from kernelbank.records import CodeIdentity, DataIdentity, EpochResult, MachineIdentity, RunRecord
from kernelbank.report.compare import Estimate, difference, estimate, grouped, notes, tabulate
from kernelbank.zoo import SMALL

BASE = RunRecord(
    study="train", row="a", model=SMALL["plain"],
    recipe={"epochs": 2, "lr": 0.1}, data=DataIdentity("digits", "0" * 64, 10, 5, 5), seed=0,
    code=CodeIdentity("0", "1", None), machine=MachineIdentity("cpu", 2, "2", "3", 1), params=1000, macs=2000,
)  # fmt: skip


def run(mixer: str, seed: int, top1: float, **changes: object) -> RunRecord:
    epochs = (EpochResult(2.0, 2.0, top1 - 10, 1.0), EpochResult(1.0, 1.0, top1, 1.0))
    model = replace(BASE.model, mixer=mixer)
    return replace(BASE, model=model, seed=seed, epochs=epochs, test_top1=top1 + 1, **changes)  # type: ignore[arg-type]


def test_runs_that_differ_in_their_seed_are_one_row() -> None:
    runs = [run("vit", 0, 80.0), run("swin", 0, 83.0), run("vit", 1, 81.0), run("swin", 1, 84.5), run("vit", 2, 85.0)]
    first, second = tabulate(grouped(runs))
    assert (first.label, first.seeds, second.label, second.seeds) == ("vit", (0, 1, 2), "swin", (0, 1))
    assert first.val_top1 is not None and first.val_top1.mean == pytest.approx(82.0)
    # Student's t for 2 degrees of freedom is 4.3027
    assert first.val_top1.half == pytest.approx(4.3027 * stdev([80, 81, 85]) / math.sqrt(3), rel=1e-4)
    assert first.difference is None and second.epochs_to_first == 2 and first.epochs_to_first == 2


def test_differences_are_paired_where_the_seeds_are_the_same() -> None:
    paired = difference({0: 3.0, 1: 13.0}, {0: 1.0, 1: 10.0})
    assert (
        paired == estimate([2.0, 3.0]) and paired is not None and paired.half == pytest.approx(12.706 * 0.5, rel=1e-3)
    )
    welch = difference({0: 3.0, 1: 13.0}, {2: 1.0, 3: 10.0})
    assert welch is not None and welch.mean == 2.5 and welch.half is not None and welch.half > 20
    assert difference({0: 3.0}, {1: 1.0}) == Estimate(2.0, None) and difference({}, {0: 1.0}) is None
    assert difference({0: 3.0, 1: 3.0}, {2: 1.0, 3: 1.0}) == Estimate(2.0, 0.0)
    assert str(Estimate(1.0, None)) == "1.00" and str(Estimate(1.0, 0.25)) == "1.00 ± 0.25"


def test_labels_say_what_differs() -> None:
    runs = [run("vit", 0, 80.0), run("vit", 0, 80.0, recipe={"epochs": 2, "lr": 0.2})]
    assert [group.label for group in grouped(runs)] == ["recipe lr=0.1", "recipe lr=0.2"]
    assert [group.label for group in grouped(runs[:1])] == ["plain vit"]
    other = run("swin", 0, 80.0, row="b", recipe={"epochs": 2, "lr": 1, "eps": 1, "ema": 1, "repeats": 3})
    assert [group.label for group in grouped([runs[0], other])] == ["vit, a", "swin, b"]


def test_what_cannot_be_compared_is_said() -> None:
    other = DataIdentity("digits", "1" * 64, 10, 5, 5)
    half = replace(run("vit", 3, 80.0), epochs=(EpochResult(2.0, 2.0, 50.0, 1.0),))
    failed = replace(BASE, seed=4, failure="training loss nan")
    said = "\n".join(notes(grouped([run("vit", 0, 80.0), run("vit", 0, 80.0, data=other), half, failed])))
    assert "the data differ" in said and "has 1 of 2 epochs" in said and "a seed 4 diverged: training loss nan" in said
    assert "one seed each" in "\n".join(notes(grouped([run("vit", 0, 80.0)])))
