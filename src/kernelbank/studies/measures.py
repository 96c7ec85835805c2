"""What claims measure on runs: accuracy in the end, the curve, sizes, time; and the validation target. Imports no
torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from types import MappingProxyType

from kernelbank.studies.trained_run import TrainedRun

BASELINE = "softmax"
"""The row that fixes the validation target."""
TARGET_BELOW = 1.0
"""How many points the validation target lies below softmax's mean accuracy on the seeds that fix it."""


def _chance(run: TrainedRun) -> float:
    return 100.0 / run.classes if run.classes else 0.0


def final_accuracy(run: TrainedRun) -> float | None:
    """Test top-1 after the last epoch; that of chance if the run diverged."""
    return _chance(run) if run.diverged else run.test_top1


def area_under_curve(run: TrainedRun) -> float | None:
    """Validation top-1 averaged over the epochs; that of chance from the epoch at which the run diverged."""
    if not run.epochs:
        return None
    curve = run.curve[: run.epochs]
    return (sum(curve) + _chance(run) * (run.epochs - len(curve))) / run.epochs


def epochs_to_target(run: TrainedRun, target: float) -> float:
    """The first epoch whose validation top-1 reaches `target`, at most all epochs; all if the run diverged."""
    reached = (epoch for epoch, value in enumerate(run.curve, 1) if value >= target)
    return float(run.epochs if run.diverged else next(reached, run.epochs))


def _log(value: float | None) -> float | None:
    """100 log(value): differences are relative ones, which `Finding` states in per cent."""
    return 100 * math.log(value) if value else None


MEASURES: Mapping[str, Callable[[TrainedRun, float], float | None]] = MappingProxyType({
    "test_top1": lambda run, target: final_accuracy(run),
    "area": lambda run, target: area_under_curve(run),
    "epochs_to_target": epochs_to_target,
    "params": lambda run, target: _log(run.params),
    "macs": lambda run, target: _log(run.macs),
    "seconds": lambda run, target: _log(run.epoch_seconds),
})  # fmt: skip
"""A measure of a run by its name, given the validation target."""


def validation_target(runs: Sequence[TrainedRun], baseline: str = BASELINE) -> tuple[float | None, frozenset[int]]:
    """The validation target of a model and the seeds that fix it: those at which the baseline alone has a run.

    The target is the baseline's mean final validation top-1 at these seeds, less `TARGET_BELOW`; None without such
    seeds. They take no part in any comparison.
    """
    others = {run.seed for run in runs if run.row != baseline}
    fixing = [run for run in runs if run.row == baseline and run.seed not in others and run.finished]
    if not fixing or not others:
        return None, frozenset()
    return mean(run.curve[-1] for run in fixing) - TARGET_BELOW, frozenset(run.seed for run in fixing)
