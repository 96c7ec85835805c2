"""Print the table of the speed goals as Markdown, from the files of `goals.py`:
``python benchmarks/goals_table.py records/speed``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def lines(folder: Path) -> Iterator[str]:
    """A line for each ratio with its quartiles, then a line for each growth exponent."""
    yield "| row | is measured | against | ms | ratio [quartiles] | wanted | |"
    yield "|---|---|---|---|---|---|---|"
    growth = []
    for path in sorted(folder.glob("*.json")):
        for found in json.loads(path.read_text())["found"]:
            if "ratio" not in found:
                growth.append(found)
                continue
            ratio, goal = found["ratio"], found["goal"]
            met = "" if goal is None else "met" if ratio["median"] >= goal else "missed"
            met += ", quartiles too wide for a verdict" if found["verdict"].startswith("none") else ""
            shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            slow, fast = (f"{found['seconds'][side]['median'] * 1e3:.1f}" for side in ("base", "other"))
            wanted = "" if goal is None else goal
            yield f"| {path.stem} | {found['other']} | {found['base']} | {slow} / {fast} | {shown} | {wanted} | {met} |"
    for found in growth:
        sides, ms = found["sides"], [f"{value * 1e3:.2f}" for value in found["seconds"]]
        peaks = ", ".join(str(peak) for peak in found["peak_mib"])
        yield (
            f"| growth | {found['subject']} | N from {sides[0]}^2 to {sides[-1]}^2: peak {peaks} MiB | {', '.join(ms)} "
            f"| N^{found['exponent']:.2f} | {'' if found['subject'] == 'sdpa' else '<= 1.35'} | |"
        )


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
