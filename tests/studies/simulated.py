"""Runs of made-up accuracies, so that claims can be decided where the truth is known."""

from __future__ import annotations

import numpy as np

from kernelbank.records import CodeIdentity, DataIdentity, MachineIdentity
from kernelbank.studies.claims import ACCURACY, Claim, ClaimPart, Measure, TestKind, versus
from kernelbank.studies.trained_run import TrainedRun
from kernelbank.studies.verdicts import Finding, decide

DATA = DataIdentity("simulated", "0" * 64, 45_000, 5_000, 50_000)
CODE = CodeIdentity("0.1.0", "c" * 64, None)
MACHINE = MachineIdentity("simulated", 1, "2.14", "3.11", 1)


def trained(
    row: str = "softmax",
    seed: int = 0,
    curve: tuple[float, ...] = (40.0, 60.0, 80.0),
    *,
    study: str = "softmax",
    model: str = "plain",
    test: float | None = None,
    failure: str | None = None,
    epochs: int | None = None,
    lr: float = 1e-3,
    seconds: float = 1.0,
    params: int = 1000,
    macs: int = 1000,
    windowed: bool = False,
    data: DataIdentity = DATA,
    machine: MachineIdentity = MACHINE,
) -> TrainedRun:
    """A run; its test accuracy is its last validation accuracy unless it is given or the run diverged."""
    epochs = epochs or len(curve)
    last = None if failure or len(curve) < epochs else curve[-1]
    return TrainedRun(
        study=study, row=row, model=model, seed=seed, curve=curve, test_top1=last if test is None else test,
        failure=failure, epochs=epochs, params=params, macs=macs, classes=10, data=data, code=CODE, machine=machine,
        recipe={"epochs": epochs, "lr": lr}, seconds=(seconds,) * len(curve), windowed=windowed,
        file=f"{study}-{model}-{row}-{seed}-{lr}.json",
    )  # fmt: skip


def drawn(
    rows: dict[str, float], seeds: int, spread: float, random: np.random.Generator, study: str = "softmax"
) -> list[TrainedRun]:
    """A run of each row and seed: the row's true accuracy, an effect of the seed that all rows share, and noise."""
    shared = random.normal(0.0, 1.0, seeds)
    return [
        trained(row, seed, (float(accuracy + shared[seed] + random.normal(0.0, spread)),), study=study)
        for row, accuracy in rows.items()
        for seed in range(seeds)
    ]


RELU = versus("relu", "softmax")


def claim(*parts: ClaimPart, needs: str = "all", study: str = "softmax") -> Claim:
    return Claim("X", "name", "statement", "1", study, parts, needs=needs)  # type: ignore[arg-type]


def the(runs: list[TrainedRun], measure: Measure = ACCURACY, test: TestKind = "superiority") -> Finding:
    """The one finding of ReLU against softmax."""
    (verdict,) = decide(runs, [claim(ClaimPart(RELU, measure, test))])
    (finding,) = verdict.findings
    assert verdict.decision == finding.decision
    return finding


def pairs(gains: list[float], **given: object) -> list[TrainedRun]:
    """Softmax at 80 % and ReLU better by `gains`, seed by seed."""
    runs = [trained("softmax", seed, (40.0, 60.0, 80.0)) for seed in range(len(gains))]
    return runs + [trained("relu", seed, (40.0, 60.0, 80.0 + gain), **given) for seed, gain in enumerate(gains)]  # type: ignore[arg-type]
