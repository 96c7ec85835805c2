"""Check every identity of `proofs` and print the verdicts."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console

from kernelbank.analysis.proofs import PROOFS, ProofResult, prove


def show_proofs(as_json: bool) -> int:
    """Print one line per identity while they are checked, or JSON at the end; return 1 if one fails, else 0."""
    console, verdicts = Console(highlight=False), list[ProofResult]()
    width = max(map(len, PROOFS))
    if not as_json:
        console.print(f"{'identity':<{width}}  max error  verdict  statement", style="bold", soft_wrap=True)
    for name in PROOFS:
        verdicts.append(prove(name))
        if not as_json:
            _print_verdict(console, verdicts[-1], width)
            sys.stdout.flush()
    holding = sum(verdict.holds for verdict in verdicts)
    if as_json:
        print(json.dumps([_as_json(verdict) for verdict in verdicts], indent=2, allow_nan=False))
    else:
        console.print(f"{holding} of {len(verdicts)} hold")
    return 0 if holding == len(verdicts) else 1


def _print_verdict(console: Console, verdict: ProofResult, width: int) -> None:
    console.print(f"{verdict.name:<{width}}  {verdict.error:9.1e}  ", end="", soft_wrap=True)
    word, style = ("holds", "green") if verdict.holds else ("fails", "bold red")
    console.print(f"{word:<7}", style=style, end="", soft_wrap=True)
    console.print(f"  {verdict.statement}", soft_wrap=True)


def _as_json(verdict: ProofResult) -> dict[str, Any]:
    error = verdict.error if math.isfinite(verdict.error) else str(verdict.error)
    return {"name": verdict.name, "statement": verdict.statement, "error": error, "tolerance": verdict.tolerance,
            "holds": verdict.holds}  # fmt: skip
