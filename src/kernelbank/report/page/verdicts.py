"""Verdicts as texts and small drawings for the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kernelbank.report.sections import evaluated
from kernelbank.studies.claims import TESTS, Measure
from kernelbank.studies.verdicts import ALPHA, IMAGE_ERROR, ClaimVerdict, Finding

Anchor = Callable[[str], str]
"""A function from the file of a run to its anchor on the page."""

RULES = (
    *(f"{test.capitalize()}: {rule}." for test, rule in TESTS.items()),
    "Differences are formed seed by seed; intervals are Student's t over seeds. A run that diverged counts with the "
    "accuracy of chance.",
    f"Tests are one-sided at {100 * ALPHA:g} %, after Holm's correction over all claims, comparisons and models of a "
    "section. Intervals are not corrected, so that one which excludes zero may still be undecided.",
    "Accuracy decides nothing where the choice of the images alone gives a standard error above "
    f"{IMAGE_ERROR:g} point.",
    "In the drawings of intervals the solid line is zero and a dashed line a margin.",
)
BEST_RATE = (
    "Each row's rate is the one with the highest validation accuracy at the tuning seeds, at which every row whose "
    "rate was searched has a run at each rate. The tuning seeds take no part in the comparison."
)
BAR = 150.0
"""The width of the drawing of an interval, in pixels."""


def verdict_views(verdicts: Sequence[ClaimVerdict], where: str, anchor: Anchor) -> list[dict[str, Any]]:
    """Return the verdicts on claims with at least one measured part, for the template."""
    return [
        {"claim": _claim(verdict), "decision": verdict.decision, "findings": [
            finding_view(finding, f"{where}-{verdict.claim.id}-{index}", anchor)
            for index, finding in enumerate(verdict.findings)
        ]}
        for verdict in evaluated(verdicts)
    ]  # fmt: skip


def _claim(verdict: ClaimVerdict) -> dict[str, Any]:
    claim = verdict.claim
    source = "our claim" if claim.paper == "ours" else f"paper, {claim.paper}"
    return {"id": claim.id, "name": claim.name, "statement": claim.statement, "source": source,
            "favours": claim.favours}  # fmt: skip


def finding_view(finding: Finding, name: str, anchor: Anchor) -> dict[str, Any]:
    """Return one comparison in one model, for the template."""
    return {
        "anchor": name, "model": finding.model, "contrast": finding.contrast.label,
        "measure": finding.part.measure.label, "rule": finding.part.rule, "decision": finding.decision,
        "effect": effect_text(finding), "range": range_text(finding), "bar": interval_bar(finding),
        "lines": list(finding_lines(finding)), "tested": tested_text(finding),
        "runs": [{"anchor": anchor(file), "name": file.rpartition("/")[2].removesuffix(".json")}
                 for file in finding.runs],
    }  # fmt: skip


def effect_text(finding: Finding) -> str:
    """Return the effect with its sign and unit; empty if it was not measured."""
    return "" if finding.effect is None else f"{finding.effect:+.2f} {finding.part.measure.unit}"


def range_text(finding: Finding) -> str:
    """Return the ends of the interval; empty if there is none."""
    return "" if finding.low is None or finding.high is None else f"{finding.low:+.2f} to {finding.high:+.2f}"


def tested_text(finding: Finding) -> str:
    """Return the seeds and the p-values."""
    seeds = f"seeds {', '.join(map(str, finding.seeds))}"
    if finding.p_holds is None or finding.p_fails is None:
        return seeds
    return f"{seeds}; adjusted p of holds {finding.p_holds:.3g}, of does not hold {finding.p_fails:.3g}"


def finding_lines(finding: Finding) -> Iterator[str]:
    """Yield the caveats of a finding."""
    if finding.reason:
        yield finding.reason
    yield from finding.remarks
    for row, runs in finding.diverged:
        yield f"{runs} run{'s' * (runs != 1)} of {row} diverged and count with the accuracy of chance"
    if finding.target is not None:
        yield f"the target is {finding.target:.2f} %"


def interval_bar(finding: Finding) -> dict[str, Any] | None:
    """Return the positions of the interval, of zero and of the margins in the drawing, in pixels, or None if there is
    no interval."""
    if finding.low is None or finding.high is None or finding.effect is None:
        return None
    margins = _margins(finding.part.measure, finding.part.test)
    reach = 1.1 * max(abs(value) for value in (finding.low, finding.high, *margins, 1e-9))

    def place(value: float) -> float:
        return round(BAR / 2 * (1 + value / reach), 1)

    return {"width": BAR, "zero": place(0.0), "margins": [place(value) for value in margins],
            "low": place(finding.low), "high": place(finding.high), "effect": place(finding.effect)}  # fmt: skip


def _margins(measure: Measure, test: str) -> tuple[float, ...]:
    """Return the margins of a test in the unit of the measure."""
    better = measure.margin if measure.higher_is_better else -measure.margin
    sides: Mapping[str, tuple[float, ...]] = {
        "superiority": (better,), "non-inferiority": (-better,), "equivalence": (-better, better)
    }  # fmt: skip
    return sides[test]


def missing_lines(verdicts: Sequence[ClaimVerdict]) -> list[str]:
    """Return the claims without a measured part, and what is missing."""
    shown = {verdict.claim.id for verdict in evaluated(verdicts)}
    return [f"{verdict.claim.id} {verdict.claim.name}: missing {'; '.join(verdict.missing)}"
            for verdict in verdicts if verdict.claim.id not in shown]  # fmt: skip
