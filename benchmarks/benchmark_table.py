"""Print the results of ``kernelbank benchmark --out FILE`` as a Markdown table:
``python benchmarks/benchmark_table.py records/compiled/deit.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def lines(record: Path) -> Iterator[str]:
    """A line for each subject, with the quartiles of its ratio to the first."""
    yield "| subject | ms | ratio [quartiles] |"
    yield "|---|---|---|"
    for row in json.loads(record.read_text())["rows"]:
        ratio = row["ratio"]
        shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        yield f"| `{row['subject']}` | {row['seconds']['median'] * 1e3:.1f} | {shown} |"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print("\n".join(lines(Path(path))))
