"""The figure of a study: learning curves, one panel per model. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from kernelbank.records import RunRecord
from kernelbank.report.study_table import by_epoch, mean_curve
from kernelbank.report.style import DASHES, PALETTE, frame_epochs, new_figure, write_figure
from kernelbank.studies.study import Study

TICKS = (0, 20, 40, 60, 80, 90, 95, 98, 100)
_BEYOND = 103.0
STRETCHED_FROM = 90.0
"""The validation top-1 in per cent, reached by any curve, from which the vertical axis is stretched towards 100."""


def draw(study: Study, records: Sequence[RunRecord], path: Path) -> None:
    """Draw validation top-1 by epoch to a PNG: the mean over seeds with a band of one standard deviation."""
    models = list(dict.fromkeys(record.model.name for record in records))
    labels = [label for label in study.labels if any(record.row == label for record in records)]
    figure = new_figure(1.0 + 5.6 * len(models), max(5.0, 0.3 * len(labels)))
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    stretched = any(epoch.val_top1 >= STRETCHED_FROM for record in records for epoch in record.epochs)
    if stretched:
        panels[0].set_yscale("function", functions=(_stretch, _shrink))
    ends = [_curves(panel, study.baseline, labels, [record for record in records if record.model.name == model])
            for panel, model in zip(panels, models, strict=True)]  # fmt: skip
    if stretched:
        panels[0].set_ylim(top=100)
        panels[0].set_yticks([tick for tick in TICKS if tick >= panels[0].get_ylim()[0]])
    for panel, model, named in zip(panels, models, ends, strict=True):
        frame_epochs(panel, model)
        _label_ends(panel, named)
    panels[0].set_ylabel(f"validation top-1, %{'  (stretched towards 100)' if stretched else ''}")
    seeds = len({record.seed for record in records})
    over = f"mean and one standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"{study.title}\n{records[0].data.name}; {over}", fontsize=11)
    write_figure(figure, path)


def _curves(
    panel: Axes, baseline: str, labels: Sequence[str], records: Sequence[RunRecord]
) -> dict[str, tuple[int, float, str]]:
    """Draw the rows of `labels` that have finished runs, and return the end and the colour of each curve, by label."""
    others, ends = [label for label in labels if label != baseline], {}
    for label in [*others, baseline]:
        chosen = [record for record in records if record.row == label]
        if not (centre := mean_curve(chosen)):
            continue
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in by_epoch(chosen)]
        epochs, index = range(1, len(centre) + 1), others.index(label) if label in others else None
        colour = "black" if index is None else PALETTE[index % len(PALETTE)]
        style = "-" if index is None else DASHES[index // len(PALETTE) % len(DASHES)]
        panel.plot(epochs, centre, color=colour, linestyle=style, linewidth=2.4 if index is None else 1.5)
        low, high = ([c + sign * s for c, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(epochs, low, high, color=colour, alpha=0.10, linewidth=0)
        ends[label] = (len(centre), centre[-1], colour)
    return ends


def _stretch(top1: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale the vertical axis logarithmically in the distance to 103 %, which spreads high accuracies."""
    return -np.log(np.maximum(_BEYOND - top1, 1e-9))


def _shrink(height: NDArray[np.float64]) -> NDArray[np.float64]:
    return _BEYOND - np.exp(-height)


def _label_ends(panel: Axes, ends: dict[str, tuple[int, float, str]]) -> None:
    """Write the name of each curve to the right of its end, in its colour, without overlap."""
    to_axes = panel.transData + panel.transAxes.inverted()
    heights = {label: float(to_axes.transform((last, value))[1]) for label, (last, value, _) in ends.items()}
    ordered = sorted(heights, key=lambda label: heights[label])
    for label, y in zip(ordered, _spread([heights[label] for label in ordered], gap=0.047), strict=True):
        last, value, colour = ends[label]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
        panel.annotate(
            label, (last, value), xytext=(1.05, y), textcoords="axes fraction", color=colour, va="center", fontsize=9,
            arrowprops=line, annotation_clip=False,
        )  # fmt: skip


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending heights as little as needed to be `gap` apart. Groups that overlap are centred."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _collide(groups[-2], groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_centre(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _collide(below: list[float], above: list[float], gap: float) -> bool:
    return _centre(above) - _centre(below) < gap * (len(above) + len(below)) / 2


def _centre(group: list[float]) -> float:
    return sum(group) / len(group)
