"""Interactive figures of a report: learning curves with bands, and accuracy against cost. Imports no torch.

A figure is Plotly's JSON. Its colours are those of `report.style`. Those that depend on the reader's light or dark
setting (text, grid, baseline) are set by the script of the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go

from kernelbank.report.style import PALETTE
from kernelbank.report.summary import SummaryRow
from kernelbank.studies.trained_run import TrainedRun
from kernelbank.text import printable

BASELINE_COLOUR = "#888888"
"""The colour of the baseline, until the script of the page sets it to that of the text."""
DASHES = ("solid", "dash", "dot", "dashdot")
START = 0.3
"""The fraction of the epochs after which the lowest mean determines the start of the vertical axis."""


@dataclass(frozen=True)
class Plot:
    """A figure with its caption; `figure` is Plotly's JSON."""

    name: str
    caption: str
    figure: str


def plots(rows: Sequence[SummaryRow]) -> tuple[Plot, ...]:
    """Return the figures of one study and model: curves, and accuracy against multiply-adds and time if these differ
    between rows."""
    found = [_curves(rows), *(_pareto(rows, axis) for axis in AXES)]
    return tuple(plot for plot in found if plot is not None)


# ---- curves ----------------------------------------------------------------------------------------------


def _curves(rows: Sequence[SummaryRow]) -> Plot | None:
    figure, styles = go.Figure(), _curve_styles(rows)
    drawn = [(row, values) for row in rows if (values := by_epoch(row.finished or row.runs))]
    if not drawn:
        return None
    for row, values in drawn:
        _add_curve(figure, row, values, styles[row.key])
    bottom = max(0.0, min(mean(at) for _, values in drawn for at in values[int(START * len(values)) :]) - 2.0)
    top = min(100.0, max(mean(at) for _, values in drawn for at in values) + 1.5)
    _finish(figure, "epoch", "validation top-1, %")
    figure.update_yaxes(range=[bottom, max(top, bottom + 1.0)])
    return Plot(
        "curves",
        "Validation top-1 by epoch: the mean over seeds, and a band of one standard deviation. The vertical axis "
        f"begins at {bottom:.0f} %: double-click to see all of it. A click on a name hides a curve.",
        _text(figure),
    )


def by_epoch(runs: Sequence[TrainedRun]) -> list[tuple[float, ...]]:
    """Return the validation top-1 of the runs that did not diverge, by epoch, up to the last epoch that all of them
    have."""
    return list(zip(*(run.curve for run in runs if not run.diverged and run.curve), strict=False))


def _add_curve(figure: go.Figure, row: SummaryRow, values: list[tuple[float, ...]], style: CurveStyle) -> None:
    epochs, centre = list(range(1, len(values) + 1)), [mean(at) for at in values]
    spread = [stdev(at) if len(at) > 1 else 0.0 for at in values]
    label, group, colour = style.label, row.key, style.colour
    shown = [f"{m:.2f} ± {s:.2f}" if len(values[0]) > 1 else f"{m:.2f}" for m, s in zip(centre, spread, strict=True)]
    if any(spread):
        edge = [c + s for c, s in zip(centre, spread, strict=True)]
        low = [c - s for c, s in zip(centre, spread, strict=True)]
        figure.add_trace(go.Scatter(
            x=epochs + epochs[::-1], y=edge + low[::-1], fill="toself", fillcolor=colour, opacity=0.12, mode="none",
            hoverinfo="skip", legendgroup=group, showlegend=False,
        ))  # fmt: skip
    seeds = len(values[0])
    figure.add_trace(go.Scatter(
        x=epochs, y=centre, mode="lines+markers" if len(values) == 1 else "lines", name=label, legendgroup=group,
        line={"color": colour, "dash": style.dash, "width": 3 if row.is_baseline else 1.8}, text=shown,
        hovertemplate=f"{label}<br>epoch %{{x}}: %{{text}} %<br>{seeds} seed{'s' * (seeds != 1)}<extra></extra>",
        meta="baseline" if row.is_baseline else None,
    ))  # fmt: skip


# ---- accuracy against cost -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A cost: its name in anchors, its label, its value for a row, the format of values, and a caveat."""

    name: str
    label: str
    cost: Callable[[SummaryRow], float | None]
    format: str
    caveat: str = ""


AXES = (
    Axis("macs", "multiply-adds of one image", lambda row: float(row.macs), ".4s"),
    Axis(
        "time",
        "measured time of a training epoch, s",
        lambda row: row.epoch_seconds,
        ".3g",
        " Times are as recorded: runs that shared a machine disturbed each other.",
    ),
)


def _pareto(rows: Sequence[SummaryRow], axis: Axis) -> Plot | None:
    """Return the figure of test top-1 against a cost, or None for fewer than two rows or costs within 1 % of each
    other."""
    points = [(cost, row.test.mean, row) for row in rows if row.test and (cost := axis.cost(row))]
    if len(points) < 2 or max(p[0] for p in points) < 1.01 * min(p[0] for p in points):
        return None
    figure, styles = go.Figure(), _curve_styles(rows)
    front = pareto_front([(cost, top1) for cost, top1, _ in points])
    figure.add_trace(go.Scatter(
        x=[point[0] for point in front], y=[point[1] for point in front], mode="lines", name="Pareto front",
        line={"color": BASELINE_COLOUR, "dash": "dot", "width": 1.5, "shape": "hv"}, hoverinfo="skip", meta="baseline",
    ))  # fmt: skip
    for cost, top1, row in points:
        deviation = row.test.deviation if row.test else None
        shown = f"{top1:.2f} ± {deviation:.2f}" if deviation is not None else f"{top1:.2f}"
        colour, label = styles[row.key].colour, styles[row.key].label
        figure.add_trace(go.Scatter(
            x=[cost], y=[top1], mode="markers", name=label, text=[shown],
            marker={"color": colour, "size": 11, "symbol": "circle" if (cost, top1) in front else "circle-open"},
            error_y={"type": "data", "array": [deviation or 0.0], "color": colour, "thickness": 1},
            hovertemplate=f"{label}<br>%{{x:{axis.format}}}: %{{text}} %<extra></extra>",
            meta="baseline" if row.is_baseline else None,
        ))  # fmt: skip
    _finish(figure, axis.label, "test top-1, %")
    return Plot(
        axis.name,
        f"Test top-1 against {axis.label}: mean and one standard deviation over seeds. Filled points are on the Pareto "
        f"front of the means: no other row is as good at less.{axis.caveat}",
        _text(figure),
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the points (cost, accuracy) for which no other point is at least as good in both, ordered by cost."""
    front = list[tuple[float, float]]()
    for cost, value in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return tuple(front)


# ---- style -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveStyle:
    """The colour and dash of a row in all figures of its study and model."""

    label: str
    colour: str
    dash: str


def _curve_styles(rows: Sequence[SummaryRow]) -> dict[str, CurveStyle]:
    """Return the colours and dashes of rows by their keys."""
    others = [row.key for row in rows if not row.is_baseline]
    several = {row.row for row in rows if sum(other.row == row.row for other in rows) > 1}
    styles = dict[str, CurveStyle]()
    for row in rows:
        index = others.index(row.key) if row.key in others else None
        label = _escaped(f"{row.row}, lr {row.rate:g}" if row.row in several else row.row)
        colour = BASELINE_COLOUR if index is None else PALETTE[index % len(PALETTE)]
        dash = "solid" if index is None else DASHES[index // len(PALETTE) % len(DASHES)]
        styles[row.key] = CurveStyle(label, colour, dash)
    return styles


def _escaped(label: str) -> str:
    """Return the label with brackets as entities, since Plotly interprets some HTML tags."""
    return printable(label).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _finish(figure: go.Figure, x: str, y: str) -> None:
    figure.update_layout(
        template="none", height=440, margin={"l": 56, "r": 12, "t": 16, "b": 48}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(title_text=x, zeroline=False, automargin=True)
    figure.update_yaxes(title_text=y, zeroline=False)


def _text(figure: go.Figure) -> str:
    """Return the figure as JSON for a script element, in which no tag can be closed."""
    document: dict[str, Any] = json.loads(figure.to_json())
    return json.dumps(document, sort_keys=True).replace("<", "\\u003c")
