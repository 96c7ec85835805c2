"""Plot images per second against resolution, with one curve per subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernelbank.benchmark.measure import Measurement
from kernelbank.report.style import COLOURS, MARKERS, new_figure, write_figure


def draw(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw `rows` to `path`, whose suffix gives the format. Both axes are logarithmic; error bars span the
    quartiles."""
    figure = new_figure(7.5, 5.0)
    panel = figure.subplots()
    for index, text in enumerate(dict.fromkeys(row.subject for row in rows)):
        mine = sorted((row for row in rows if row.subject == text), key=lambda row: row.site.side)
        sides, rates = [row.site.side for row in mine], [row.images_per_second for row in mine]
        low = [rate - row.site.batch / row.seconds.high for rate, row in zip(rates, mine, strict=True)]
        high = [row.site.batch / row.seconds.low - rate for rate, row in zip(rates, mine, strict=True)]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        panel.errorbar(sides, rates, [low, high], label=text, capsize=3, linewidth=1.6, color=colour, marker=marker)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sides = sorted({row.site.side for row in rows})
    panel.set_xticks(sides, labels=[str(side) for side in sides])
    panel.minorticks_off()
    panel.set_xlabel("side of the image or grid")
    panel.set_ylabel("images per second")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    panel.set_title(title, fontsize=10)
    write_figure(figure, path)
