"""A report as a JSON document. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kernelbank.report.sections import Section, report_notes
from kernelbank.report.summary import Spread, SummaryRow
from kernelbank.schema import encode
from kernelbank.studies.trained_run import SetAside
from kernelbank.studies.verdicts import ClaimVerdict, Finding


def document(found: Sequence[Section], aside: Sequence[SetAside]) -> dict[str, Any]:
    """Return every verdict with its findings, and every row with its runs, by setting."""
    return {
        "settings": [_section(section) for section in found],
        "set_aside": [asdict(item) for item in aside],
        "notes": list(report_notes(found, aside)),
    }


def _section(section: Section) -> dict[str, Any]:
    first = section.runs[0]
    return {
        "title": section.title,
        "data": asdict(first.data),
        "recipe": encode(dict(first.recipe)),
        "caveat": section.caveat,
        "notes": list(section.notes),
        "verdicts": [_verdict(verdict) for verdict in section.shared],
        "verdicts_at_best_rate": None if section.best is None else [_verdict(verdict) for verdict in section.best],
        "rows": [_row(row) for row in section.rows],
    }


def _verdict(verdict: ClaimVerdict) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "id": claim.id, "name": claim.name, "statement": claim.statement, "paper": claim.paper, "study": claim.study,
        "needs": claim.needs, "favours": list(claim.favours), "decision": verdict.decision,
        "missing": list(verdict.missing), "findings": [_finding(finding) for finding in verdict.findings],
    }  # fmt: skip


def _finding(finding: Finding) -> dict[str, Any]:
    measure = finding.part.measure
    return {
        "model": finding.model, "contrast": finding.contrast.label, "weights": dict(finding.contrast.weights),
        "measure": measure.name, "unit": measure.unit, "test": finding.part.test, "margin": measure.margin,
        "decision": finding.decision, "reason": finding.reason, "remarks": list(finding.remarks),
        "effect": finding.effect, "low": finding.low, "high": finding.high, "seeds": list(finding.seeds),
        "p_holds": finding.p_holds, "p_fails": finding.p_fails, "target": finding.target,
        "diverged": dict(finding.diverged), "runs": list(finding.runs),
    }  # fmt: skip


def _row(row: SummaryRow) -> dict[str, Any]:
    return {
        "study": row.study, "model": row.model, "row": row.row, "lr": row.rate, "mixer": row.mixer, "mlp": row.mlp,
        "changed": dict(row.changed), "roles": list(row.roles), "params": row.params, "macs": row.macs,
        "epoch_seconds": row.epoch_seconds, "val_top1": _spread(row.val), "test_top1": _spread(row.test),
        "difference": None if row.difference is None else asdict(row.difference)
        | {"low": row.difference.low, "high": row.difference.high},
        "diverged": row.diverged, "unfinished": row.unfinished,
        "runs": [{"seed": run.seed, "file": run.file} for run in row.runs],
    }  # fmt: skip


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else asdict(spread)
