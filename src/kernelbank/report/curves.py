"""Learning curves of runs: training loss and validation top-1. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes

from kernelbank.report.compare import Group
from kernelbank.report.style import COLOURS, DASHES, frame_epochs, new_figure, write_figure

PANELS = (("train_loss", "training loss"), ("val_top1", "validation top-1, %"))


def draw(groups: Sequence[Group], path: Path) -> None:
    """A panel for each quantity: the mean over seeds by epoch, and a band of one standard deviation."""
    figure = new_figure(12.0, 4.8)
    panels = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for panel, (field, title) in zip(panels, PANELS, strict=True):
        for index, group in enumerate(groups):
            _curve(panel, group, field, index)
        frame_epochs(panel, title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, frameon=False)
    write_figure(figure, path)


def _curve(panel: Axes, group: Group, field: str, index: int) -> None:
    values = group.curve(field)
    if not values:
        return
    colour, style = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    epochs, centre = range(1, len(values) + 1), [mean(row) for row in values]
    seeds = len(group.finished)
    label = f"{group.label} ({seeds} seed{'s' * (seeds > 1)})"
    marker = "o" if len(values) == 1 else None
    panel.plot(epochs, centre, color=colour, linestyle=style, linewidth=1.6, marker=marker, label=label)
    if seeds > 1:
        spread = [stdev(row) for row in values]
        low, high = ([c + sign * s for c, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
