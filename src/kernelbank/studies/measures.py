"""The measures of the claims: final accuracy, the learning curve, sizes and time; and the validation target. Imports no
torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from types import MappingProxyType

from kernelbank.studies.trained_run import TrainedRun

BASELINE = "softmax"
"""The row that determines the validation target."""
TARGET_BELOW = 1.0
"""The distance in points from softmax's mean accuracy, on the seeds of the target, down to the validation target."""


def _chance(run: TrainedRun) -> float:
    return 100.0 / run.classes if run.classes else 0.0


def final_accuracy(run: TrainedRun) -> float | None:
    """Test top-1 after the last epoch, or chance accuracy if the run diverged."""
    return _chance(run) if run.diverged else run.test_top1


def area_under_curve(run: TrainedRun) -> float | None:
    """Validation top-1 averaged over the epochs, with chance accuracy from the epoch at which the run diverged."""
    if not run.epochs:
        return None
    curve = run.curve[: run.epochs]
    return (sum(curve) + _chance(run) * (run.epochs - len(curve))) / run.epochs


def epochs_to_target(run: TrainedRun, target: float) -> float:
    """The first epoch whose validation top-1 reaches `target`. If none does, or the run diverged, the number of
    epochs."""
    reached = (epoch for epoch, value in enumerate(run.curve, 1) if value >= target)
    return float(run.epochs if run.diverged else next(reached, run.epochs))


def _log(value: float | None) -> float | None:
    """100 log(value), so that differences are relative. `Finding` converts them to per cent."""
    return 100 * math.log(value) if value else None


MEASURES: Mapping[str, Callable[[TrainedRun, float], float | None]] = MappingProxyType({
    "test_top1": lambda run, target: final_accuracy(run),
    "area": lambda run, target: area_under_curve(run),
    "epochs_to_target": epochs_to_target,
    "params": lambda run, target: _log(run.params),
    "macs": lambda run, target: _log(run.macs),
    "seconds": lambda run, target: _log(run.epoch_seconds),
})  # fmt: skip
"""The measures by name: functions of a run and the validation target."""


def validation_target(runs: Sequence[TrainedRun], baseline: str = BASELINE) -> tuple[float | None, frozenset[int]]:
    """Return the validation target of a model and the seeds that determine it, which are those with a run of the
    baseline only.

    The target is the baseline's mean final validation top-1 at these seeds minus `TARGET_BELOW`, or None if there are
    no such seeds. These seeds are not used in comparisons.
    """
    others = {run.seed for run in runs if run.row != baseline}
    fixing = [run for run in runs if run.row == baseline and run.seed not in others and run.finished]
    if not fixing or not others:
        return None, frozenset()
    return mean(run.curve[-1] for run in fixing) - TARGET_BELOW, frozenset(run.seed for run in fixing)
