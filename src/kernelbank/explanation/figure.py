"""Figures: the maps of a position over depth on the picture, and the statistics over depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.page import Column, Shown
from kernelbank.explanation.statistics import TITLES, HeadStatistics, head_taps
from kernelbank.report.style import COLOURS, DASHES, new_figure, write_figure

MOST_LAYERS = 6
SIGNED = LinearSegmentedColormap.from_list("signed", [
    "#06265c", "#14549e", "#428cc8", "#9ecae1", "#f7f5f0", "#fecc80", "#f07f20", "#b23e06", "#5c1804",
])  # fmt: skip
"""Blue is negative, orange positive, zero neutral, as on the page."""


def draw_maps(columns: Sequence[Column], position: tuple[float, float], path: Path) -> None:
    """Write a figure of the effective kernel, the mean over heads, at a `position` (down, along, as shares of the
    picture): a row per model and picture, a panel per layer, at most `MOST_LAYERS`."""
    rows = [(column, shown) for column in columns for shown in column.shown]
    width = 1 + max(len(_spread(shown.layers)) for _, shown in rows)
    figure = new_figure(2.25 * width, 2.75 * len(rows))
    panels = figure.subplots(len(rows), width, squeeze=False)
    for (column, shown), line in zip(rows, panels, strict=True):
        for panel in line:
            panel.set_axis_off()
        _picture(line[0], shown, position)
        line[0].set_title("\n".join(wrap(column.label, 30, max_lines=3)), fontsize=8, loc="left")
        for panel, layer in zip(line[1:], _spread(shown.layers), strict=False):
            _map(panel, layer, shown, position)
    write_figure(figure, path)


def draw_statistics(columns: Sequence[Column], path: Path) -> None:
    """Write curves over depth: a panel per statistic, a line per model (the mean over heads and pictures), a dot per
    head."""
    names = [name for name in TITLES if name != "seen"]
    figure = new_figure(3.1 * len(names), 3.4)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for index, column in enumerate(columns):
            _curve(panel, column, name, index)
        panel.set_title(TITLES[name], fontsize=10)
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, frameon=False)
    write_figure(figure, path)


def _spread(layers: Sequence[LayerMaps]) -> list[LayerMaps]:
    """At most `MOST_LAYERS` of the layers, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return list(layers)
    places = np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)
    return [layers[place] for place in places]


def _cell(grid: tuple[int, int], position: tuple[float, float]) -> tuple[int, int]:
    down, along = (min(int(share * side), side - 1) for share, side in zip(position, grid, strict=True))
    return down, along


def _picture(panel: Axes, shown: Shown, position: tuple[float, float]) -> None:
    image = np.asarray(shown.picture.sharp.convert("RGB"))
    panel.imshow(image)
    y, x = (share * side for share, side in zip(position, image.shape[:2], strict=True))
    panel.plot([x], [y], marker="s", markersize=8, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3)
    panel.plot([x], [y], marker="s", markersize=8, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.4)


def _map(panel: Axes, layer: LayerMaps, shown: Shown, position: tuple[float, float]) -> None:
    """The mean over heads at a position, over the picture in grey."""
    height, width = layer.grid
    y, x = _cell(layer.grid, position)
    grey = np.asarray(shown.picture.sharp.convert("L").convert("RGB"))
    panel.imshow((0.35 * grey + 165).astype(np.uint8), extent=(0, width, height, 0))
    panel.set_xlim(0, width)
    panel.set_ylim(height, 0)
    for colour, thickness in (("black", 2.6), ("white", 1.2)):
        panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=thickness, zorder=3))
    if layer.origin is None and layer.kernels is None:
        panel.set_title(f"{layer.name}\na static bank has no place", fontsize=7)
        return
    values, box = _values(layer, y, x)
    top = float(np.nanmax(np.abs(values))) or 1.0
    shares = values / top
    alpha = np.where(np.isnan(shares), 0, np.clip(0.05 + 1.1 * np.sqrt(np.abs(np.nan_to_num(shares))), 0, 1) * 0.92)
    panel.imshow(np.nan_to_num(shares), cmap=SIGNED, vmin=-1, vmax=1, alpha=alpha, extent=box, interpolation="nearest")
    low = float(np.nanmin(values))
    panel.set_title(f"{layer.name}\n{low:.2g} to {float(np.nanmax(values)):.2g}", fontsize=7)


def _values(layer: LayerMaps, y: int, x: int) -> tuple[Any, tuple[float, float, float, float]]:
    """(the effective kernel of a position as a map, NaN where it sees nothing, its extent on the grid)."""
    row = layer.prefix + y * layer.grid[1] + x
    effective = layer.effective
    if effective is None or layer.origin is None:
        assert layer.kernels is not None
        taps = head_taps(layer)[0]
        size = layer.spec.size
        kernel = taps[row if len(taps) > 1 else 0].mean(0).reshape(size, size).double().cpu().numpy()
        half = size // 2
        return kernel, (x - half, x + half + 1, y + half + 1, y - half)
    weights = effective.values[0, :, row].mean(0)
    kernels = layer.tokens[0 if layer.index is None else row]
    stride = layer.stride
    height, width = (-(-side // stride) for side in layer.grid)
    values = np.full((height, width), np.nan)
    for token, weight in zip(kernels.tolist(), weights.tolist(), strict=True):
        if token >= layer.prefix:
            down, along = divmod(token - layer.prefix, layer.grid[1])
            values[down // stride, along // stride] = weight
    return values, (0, width * stride, height * stride, 0)


def _curve(panel: Axes, column: Column, name: str, index: int) -> None:
    heads: list[HeadStatistics] = [head for shown in column.shown for head in shown.statistics]
    names = list(dict.fromkeys(head.layer for head in heads))
    points = [[v for head in heads if head.layer == layer and (v := getattr(head, name)) is not None]
              for layer in names]  # fmt: skip
    places = [place for place, values in enumerate(points, 1) if values]
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    panel.plot(places, [float(np.mean(points[place - 1])) for place in places], color=colour, linestyle=dashes,
               linewidth=1.6, label=column.label)  # fmt: skip
    for place in places:
        panel.plot([place] * len(points[place - 1]), points[place - 1], ".", color=colour, markersize=3, alpha=0.45)
