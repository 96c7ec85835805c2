"""Claims decided on runs: effects paired by seed, their intervals, and verdicts after Holm's correction. Imports no
torch.

Everything here is a pure function of `TrainedRun` values of one setting (data and recipe). The rules:

- A difference is formed seed by seed, over the seeds at which all rows of a contrast have runs; its interval is
  Student's t over seeds. The standard deviation is taken as at least one image of the split, or half an epoch.
- A run that diverged counts: with the accuracy of chance from then on, and as never reaching a target.
- A run that is not finished is not used.
- Hypotheses are one-sided at 2.5 %, as the 95 % interval is, after Holm's correction over all claims, parts and models
  of the setting; those of "holds" and those of "does not hold" are a family each. Intervals are not corrected.
- Where the split is so small that the choice of its images alone gives a difference of accuracies a standard error
  above a point, accuracy decides nothing: the verdict is undecided, whatever the interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from types import MappingProxyType
from typing import Literal

from kernelbank.studies.claims import CLAIMS, Claim, ClaimPart, Contrast, Measure, TestKind
from kernelbank.studies.intervals import CONFIDENCE, holm, interval, p_above, p_below
from kernelbank.studies.measures import MEASURES, validation_target
from kernelbank.studies.trained_run import TrainedRun

Decision = Literal["holds", "does not hold", "undecided", "not evaluated"]
ALPHA = (1 - CONFIDENCE) / 2
EXACT = 1e-9
"""The largest difference that rounding gives to numbers which are the same."""
IMAGE_ERROR = 1.0
"""The largest standard error from the choice of images, in points, at which accuracy decides anything."""


@dataclass(frozen=True)
class Finding:
    """The result for one part of a claim in one model.

    `effect` is in the unit of the measure (per cent for relative measures), and `low` and `high` are the ends of its 95
    % interval, or None without one. `p_holds` and `p_fails` are one-sided and adjusted by Holm's method. `reason`
    states why there is no decision, `remarks` are caveats, `diverged` counts diverged runs by row, and `runs` are the
    files of the run records that were used.
    """

    model: str
    part: ClaimPart
    contrast: Contrast
    decision: Decision
    reason: str = ""
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: tuple[int, ...] = ()
    p_holds: float | None = None
    p_fails: float | None = None
    target: float | None = None
    diverged: tuple[tuple[str, int], ...] = ()
    runs: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimVerdict:
    """The decision on a claim in one setting over all its models, with the findings that it is based on."""

    claim: Claim
    decision: Decision
    findings: tuple[Finding, ...]
    missing: tuple[str, ...] = ()


# ---- decisions -------------------------------------------------------------------------------------------

_Hypotheses = Callable[[Sequence[float], float, float], tuple[float, float]]


def _superior(gains: Sequence[float], margin: float, resolution: float) -> tuple[float, float]:
    return p_above(gains, 0.0, resolution), p_below(gains, margin, resolution)


def _not_inferior(gains: Sequence[float], margin: float, resolution: float) -> tuple[float, float]:
    return p_above(gains, -margin, resolution), p_below(gains, -margin, resolution)


def _equivalent(gains: Sequence[float], margin: float, resolution: float) -> tuple[float, float]:
    inside = max(p_above(gains, -margin, resolution), p_below(gains, margin, resolution))
    outside = min(p_below(gains, -margin, resolution), p_above(gains, margin, resolution))
    return inside, min(1.0, 2 * outside)


HYPOTHESES: Mapping[TestKind, _Hypotheses] = MappingProxyType({
    "superiority": _superior, "non-inferiority": _not_inferior, "equivalence": _equivalent,
})  # fmt: skip
"""The p-values of "holds" and of "does not hold" of gains (positive is better), by the test."""


def decide(runs: Sequence[TrainedRun], claims: Iterable[Claim] = CLAIMS) -> tuple[ClaimVerdict, ...]:
    """Return the verdict on every claim from runs of one setting, with one learning rate per row."""
    claims = tuple(claims)
    raw = [_findings(claim, runs) for claim in claims]
    decided = iter(_corrected([finding for findings in raw for finding in findings]))
    return tuple(
        _verdict(claim, tuple(next(decided) for _ in findings), runs)
        for claim, findings in zip(claims, raw, strict=True)
    )


def _findings(claim: Claim, runs: Sequence[TrainedRun]) -> list[Finding]:
    """Return a finding for each model and part, before the correction of p-values."""
    ours = [run for run in runs if run.study == claim.study and (run.finished or run.diverged)]
    findings = list[Finding]()
    for model in dict.fromkeys(run.model for run in ours):
        members = [run for run in ours if run.model == model]
        target, fixing = validation_target(members)
        compared = [run for run in members if run.seed not in fixing]
        findings += [_measured(model, part, compared, target) for part in claim.parts]
    return findings


def _measured(model: str, part: ClaimPart, runs: Sequence[TrainedRun], target: float | None) -> Finding:
    contrast = part.contrast.in_windows() if any(run.windowed for run in runs) else part.contrast
    rows = {row: [run for run in runs if run.row == row] for row in contrast.weights}
    empty = Finding(model, part, contrast, "not evaluated")
    if reason := _unusable(rows):
        return replace(empty, reason=reason)
    if part.measure.name == "epochs_to_target" and target is None:
        return replace(empty, reason="missing seeds: a seed at which softmax alone has a run, to fix the target")
    by_seed = {row: {run.seed: run for run in members} for row, members in rows.items()}
    seeds = _common(rows)
    used = [by_seed[row][seed] for row in rows for seed in seeds]
    if part.measure.name == "seconds" and len({(run.machine, run.code.sources) for run in used}) > 1:
        return replace(empty, reason="missing times: the rows were timed on different machines or by different code")
    values = [_difference(part.measure, contrast, by_seed, seed, target or 0.0) for seed in seeds]
    differences = [value for value in values if value is not None]
    if len(differences) < len(seeds):
        return replace(empty, reason=f"missing numbers: a run has no {part.measure.label}")
    if part.measure.exact and max(differences) - min(differences) > EXACT:
        return replace(empty, reason=f"conflicting runs: seeds of the same row differ in {part.measure.label}")
    diverged = {row: sum(by_seed[row][seed].diverged for seed in seeds) for row in rows}
    return _tested(replace(
        empty, seeds=seeds, target=target if part.measure.name == "epochs_to_target" else None,
        diverged=tuple((row, count) for row, count in diverged.items() if count),
        runs=tuple(run.file for run in used), remarks=tuple(_remarks(rows, seeds, used)),
    ), differences, used)  # fmt: skip


def _unusable(rows: Mapping[str, Sequence[TrainedRun]]) -> str:
    """Return why rows cannot be compared; empty if they can."""
    if missing := [row for row, members in rows.items() if not members]:
        return f"missing rows: {', '.join(missing)}"
    for row, members in rows.items():
        first: dict[int, TrainedRun] = {}
        for run in members:
            if (other := first.setdefault(run.seed, run)) is not run:
                return f"conflicting runs: row {row} has two runs of seed {run.seed}: {other.file}, {run.file}"
    return "" if _common(rows) else f"missing seeds: none is common to the rows {', '.join(rows)}"


def _common(rows: Mapping[str, Sequence[TrainedRun]]) -> tuple[int, ...]:
    """The seeds at which every row has a run."""
    return tuple(sorted(set.intersection(*({run.seed for run in members} for members in rows.values()))))


def _remarks(
    rows: Mapping[str, Sequence[TrainedRun]], seeds: Sequence[int], used: Sequence[TrainedRun]
) -> Iterator[str]:
    """Yield the caveats of a finding."""
    for row, members in rows.items():
        if unpaired := sorted(run.seed for run in members if run.seed not in seeds):
            yield f"seeds of {row} that another row lacks were left out: {', '.join(map(str, unpaired))}"
    if (states := len({run.code.sources for run in used})) > 1:
        yield f"the runs were made by {states} states of the code"


def _difference(
    measure: Measure, contrast: Contrast, rows: Mapping[str, Mapping[int, TrainedRun]], seed: int, target: float
) -> float | None:
    """Return the contrast at one seed, or None if a run lacks the value."""
    total = 0.0
    for row, weight in contrast.weights.items():
        value = MEASURES[measure.name](rows[row][seed], target)
        if value is None:
            return None
        total += weight * value
    return total


def _tested(finding: Finding, differences: list[float], used: list[TrainedRun]) -> Finding:
    """Return the finding with its effect, interval and p-values. Its decision is open until they are corrected."""
    measure, test = finding.part.measure, finding.part.test
    sign = 1.0 if measure.higher_is_better else -1.0
    if measure.exact:
        better = sign * differences[0] > EXACT
        return replace(finding, effect=_shown(measure, differences[0]), decision="holds" if better else "does not hold")
    images = _images(measure, used)
    resolution = measure.step or (100.0 / images if images else 0.0)
    estimate = interval(differences, resolution)
    low, high = (None if end is None else _shown(measure, end) for end in (estimate.low, estimate.high))
    finding = replace(finding, decision="undecided", effect=_shown(measure, estimate.mean), low=low, high=high)
    if estimate.half is None:
        return replace(finding, reason="one seed gives no interval")
    gains = [sign * value for value in differences]
    p_holds, p_fails = HYPOTHESES[test](gains, measure.margin, resolution)
    finding = replace(finding, p_holds=p_holds, p_fails=p_fails)
    if images and (error := image_error(used, images)) > IMAGE_ERROR:
        return replace(finding, reason=f"{images:,} images cannot decide it: the choice of the images alone gives a "
                                       f"difference a standard error of up to {error:.1f} points")  # fmt: skip
    return finding


def _shown(measure: Measure, value: float) -> float:
    """Convert a difference to the unit of the measure. Relative ones are 100 log ratios and become per cent."""
    return 100 * math.expm1(value / 100) if measure.relative else value


def _images(measure: Measure, used: Sequence[TrainedRun]) -> int:
    """Return the number of images of the split on which the measure is an accuracy, or 0 for other measures."""
    return 0 if measure.images is None else int(getattr(used[0].data, measure.images))


def image_error(runs: Sequence[TrainedRun], images: int) -> float:
    """Return an upper bound, in points, of the standard error of a difference between two accuracies due to the choice
    of `images` images: that of two independent samples at the mean accuracy of the runs."""
    finals = [run.curve[-1] / 100 for run in runs if run.curve and not run.diverged]
    accuracy = mean(finals) if finals else 0.5
    return 100 * math.sqrt(2 * accuracy * (1 - accuracy) / images)


def _corrected(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings with p-values adjusted over all of them, and with their decisions."""
    tested = [index for index, finding in enumerate(findings) if finding.p_holds is not None]
    result = list(findings)
    holds = holm([findings[index].p_holds or 0.0 for index in tested])
    fails = holm([findings[index].p_fails or 0.0 for index in tested])
    for index, p_holds, p_fails in zip(tested, holds, fails, strict=True):
        decision: Decision = "undecided"
        if not findings[index].reason:
            decision = "holds" if p_holds <= ALPHA else "does not hold" if p_fails <= ALPHA else "undecided"
        result[index] = replace(findings[index], decision=decision, p_holds=p_holds, p_fails=p_fails)
        if decision == "holds" and findings[index].part.test == "superiority" and p_fails <= ALPHA:
            small = f"shown, and shown to be less than the margin of {findings[index].part.margin_text}"
            result[index] = replace(result[index], remarks=(*result[index].remarks, small))
    return result


def _verdict(claim: Claim, findings: tuple[Finding, ...], runs: Sequence[TrainedRun]) -> ClaimVerdict:
    lacking: dict[str, list[str]] = {}
    for finding in findings:
        if finding.decision == "not evaluated" and finding.model not in lacking.setdefault(finding.reason, []):
            lacking[finding.reason].append(finding.model)
    missing = tuple(f"{reason.removeprefix('missing ')} ({', '.join(models)})" for reason, models in lacking.items())
    if not findings:
        others = "" if any(run.study == claim.study for run in runs) else f"runs of study {claim.study}"
        return ClaimVerdict(claim, "not evaluated", (), (others or f"finished runs of study {claim.study}",))
    models = dict.fromkeys(finding.model for finding in findings)
    combine = every if claim.needs == "all" else some
    by_model = [combine([f.decision for f in findings if f.model == model]) for model in models]
    return ClaimVerdict(claim, every(by_model), findings, missing)


def every(decisions: Sequence[Decision]) -> Decision:
    """Combine the decisions of the parts of a claim that needs all of them."""
    order: tuple[Decision, ...] = ("does not hold", "not evaluated", "undecided")
    return next((decision for decision in order if decision in decisions), "holds")


def some(decisions: Sequence[Decision]) -> Decision:
    """Combine the decisions of the parts of a claim that needs any of them."""
    order: tuple[Decision, ...] = ("holds", "not evaluated", "undecided")
    return next((decision for decision in order if decision in decisions), "does not hold")
