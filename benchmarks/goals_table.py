"""The goals table as Markdown from the records of `goals.py`: ``python benchmarks/goals_table.py records/speed``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def lines(folder: Path) -> Iterator[str]:
    """One line for each ratio, with its quartiles; growth exponents after them."""
    yield "| goal | is measured against | ratio [quartiles] | wanted | |"
    yield "|---|---|---|---|---|"
    growth = []
    for path in sorted(folder.glob("*.json")):
        for found in json.loads(path.read_text())["found"]:
            if "ratio" not in found:
                growth.append(found)
                continue
            ratio = found["ratio"]
            met = "met" if ratio["median"] >= found["goal"] else "missed"
            met += ", quartiles too wide for a verdict" if found["verdict"].startswith("none") else ""
            other = found["other"].partition(" (mixer")[0]
            shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            yield f"| {other} | {found['base']} | {shown} | {found['goal']} | {met} |"
    for found in growth:
        sides = found["sides"]
        yield f"| {found['subject']} | N from {sides[0]}^2 to {sides[-1]}^2 | N^{found['exponent']:.2f} | | |"


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
