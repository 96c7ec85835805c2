"""The panels of the figure: the kernels of the bank that a position uses, and the channels that a kernel connects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Circle, Rectangle

from kernelbank.analysis.chain import BankText, kernel_text
from kernelbank.analysis.host import Host
from kernelbank.spec import (
    Box,
    Dynamic,
    Full,
    Grouped,
    Mean,
    MixerSpec,
    Own,
    Pool,
    Predict,
    Project,
    Stack,
    Static,
    TwoStep,
)
from kernelbank.spec.inventory import Grid
from kernelbank.spec.support import sees

INK = "#222222"
COLOURS = {"static": "#cfd8e6", "dynamic": "#fbd5a5", "activation": "#cbe6c3"}
SEEN, UNSEEN, QUERY, PREFIX = "#f2a33a", "#f3f3f3", "#b2182b", "#e9c46a"
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2")
ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
LARGEST = 14
"""The largest side of a grid that is drawn whole; of a larger one the upper left corner is drawn."""


def draw_bank(axes: Axes, spec: MixerSpec, host: Host, origin: BankText) -> None:
    """Draw where the kernels come from, in words, and the kernels that a position uses."""
    height = axes.get_ylim()[1]
    axes.text(50, height - 1, "\n".join((origin.title, *origin.lines)), ha="center", va="top", fontsize=10, color=INK,
              linespacing=1.35)  # fmt: skip
    top = height - 6 - 4.6 * (len(origin.lines) + 1)
    match spec.bank, spec.mix:
        case Dynamic(), Project(r=r):
            _mixtures(axes, top, host, r)
        case Dynamic(), _:
            _positions(axes, top, spec, host)
        case Static(), Predict():
            _prototypes(axes, top, host)
        case Static(), _:
            _learned(axes, top, host)
        case _:
            _taps(axes, (50, top - 20), 30, host.spec.size, box=True)


# ---- what a position sees --------------------------------------------------------------------------------


def _positions(axes: Axes, top: float, spec: MixerSpec, host: Host) -> None:
    """Draw two positions, one inside and one at the border, and the kernels they see; one line per shift."""
    blocks = [spec.at_block(block) for block in (0, 1)]
    rows = blocks if blocks[0] != blocks[1] else blocks[:1]
    height, width = (min(side, LARGEST) for side in host.grid)
    queries = {"inside": (height * 3 // 8, width * 5 // 8), "at the border": (height - 1, min(1, width - 1))}
    room = (top - 14) / len(rows) - 10
    cell = min(room / height, 40 / (width + (2 if host.prefix else 0)))
    for row, block in enumerate(rows):
        upper = top - 7 - row * (room + 10)
        if len(rows) > 1:
            label = f"{('even', 'odd')[row]} blocks: {block.support}"
            axes.text(50, upper + 2, label, ha="center", fontsize=9.5, color=INK)
        for column, (where, query) in enumerate(queries.items()):
            left = 5 + 50 * column + (2 * cell if host.prefix else 0)
            count = _grid(axes, (left, upper), cell, block, host, query=query)
            axes.text(left + cell * width / 2, upper - cell * height - 1.5, f"{where}: {count}", ha="center", va="top",
                      fontsize=9, color=INK)  # fmt: skip
    below = upper - cell * height - 8
    axes.text(50, below, _use(spec, host), ha="center", va="top", fontsize=9.5, color=INK, linespacing=1.3)


def _use(spec: MixerSpec, host: Host) -> str:
    corner = "" if max(host.grid) <= LARGEST else f"upper left corner of {host.grid[0]} × {host.grid[1]};  "
    match spec.mix:
        case Stack():
            use = "each coloured kernel is one output channel"
        case _ if isinstance(spec.support, Own):
            use = "the coloured kernel is used at this position alone"
        case Mean():
            use = "the coloured kernels are averaged into one"
        case Pool():
            use = "the coloured features are averaged, then one kernel is generated"
        case _:
            use = ""
    prefix = "; beside the grid: the prefix tokens" if host.prefix else ""
    return f"{corner}red: the position{prefix}\n{use}"


def _grid(axes: Axes, corner: tuple[float, float], cell: float, spec: MixerSpec, host: Host, *, query: Grid) -> str:
    """Draw the grid (its upper left part), colour the kernels that `query` sees, and return their number as text."""
    (left, upper), (height, width) = corner, (min(side, LARGEST) for side in host.grid)
    stride = spec.bank.stride if isinstance(spec.bank, Dynamic) else 1
    alone = isinstance(spec.support, Own)
    cells, colours = [], []
    for y, x in product(range(0, height, stride), range(0, width, stride)):
        size = (min(stride, width - x) * cell, min(stride, height - y) * cell)
        cells.append(Rectangle((left + x * cell, upper - y * cell - size[1]), *size))
        colours.append(SEEN if sees(spec.support, host.grid, query, (y, x)) else UNSEEN)
    axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors="white", linewidths=0.8))
    axes.add_patch(Rectangle((left, upper - height * cell), width * cell, height * cell, fill=False, edgecolor=INK,
                             linewidth=0.8))  # fmt: skip
    axes.add_patch(Circle((left + (query[1] + 0.5) * cell, upper - (query[0] + 0.5) * cell), 0.28 * cell, color=QUERY))
    for index in range(min(host.prefix, height)):
        axes.add_patch(Rectangle((left - 1.6 * cell, upper - (index + 1) * cell), cell, cell, edgecolor=INK,
                                 facecolor=UNSEEN if alone else SEEN, linewidth=0.8))  # fmt: skip
    if stride > 1:
        return f"{host.kernels} of {host.kernels}"
    keys = ((y, x) for y in range(host.grid[0]) for x in range(host.grid[1]))
    number = sum(sees(spec.support, host.grid, query, key) for key in keys) + (0 if alone else host.prefix)
    return f"{number} of {host.kernels}"


# ---- kernels that belong to no position ------------------------------------------------------------------


def _shown(count: int, most: int) -> list[str]:
    """The labels of `count` kernels, of which `most` can be drawn: all, or the first ones, dots and the last."""
    if count <= most:
        return [str(index + 1) for index in range(count)]
    return [*(str(index + 1) for index in range(most - 2)), "…", str(count)]


def _square(axes: Axes, centre: tuple[float, float], side: float, label: str, colour: str) -> None:
    """Draw a kernel, or dots for the kernels that are left out."""
    if not label.endswith("…"):
        axes.add_patch(Rectangle((centre[0] - side / 2, centre[1] - side / 2), side, side, facecolor=colour,
                                 edgecolor=INK, linewidth=0.8))  # fmt: skip
    axes.text(*centre, "…" if label.endswith("…") else label, ha="center", va="center", fontsize=9, color=INK)


def _mixtures(axes: Axes, top: float, host: Host, rank: int) -> None:
    """Draw learned combinations of all kernels; line widths stand for the learned weights."""
    many, few, side = _shown(host.kernels, 8), _shown(rank, 5), 7.5
    bottom = 14
    heights = [
        [top - 8 - (top - 8 - bottom) * (i + 0.5) / len(labels) for i in range(len(labels))] for labels in (many, few)
    ]
    ends = (20 + side / 2, 80 - side / 2)
    for i, (label, y) in enumerate(zip(many, heights[0], strict=True)):
        for j, (mixed, to) in enumerate(zip(few, heights[1], strict=True)):
            if "…" not in (label, mixed):
                weight = math.sin(1.7 * i + 2.9 * j + 0.5) ** 2
                axes.plot(ends, (y, to), color=INK, linewidth=0.2 + 2.2 * weight, alpha=0.55)
    for label, y in zip(many, heights[0], strict=True):
        _square(axes, (20, y), side, label, SEEN)
    for label, y in zip(few, heights[1], strict=True):
        _square(axes, (80, y), side, label, PREFIX)
    names = "E" if isinstance(host.spec.mix, Project) and host.spec.mix.shared else "E, F"
    axes.text(20, top - 4, "generated", ha="center", fontsize=10, color=INK)
    axes.text(80, top - 4, "used at every position", ha="center", fontsize=10, color=INK)
    words = f"lines: {names}, {host.kernels} × {rank} learned weights,\nshared by all images"
    axes.text(50, 1, words, ha="center", va="bottom", fontsize=9.5, color=INK, linespacing=1.3)


def _prototypes(axes: Axes, top: float, host: Host) -> None:
    """Draw K learned kernels, the coefficients of one image as bars, and the mixed kernel."""
    labels = _shown(host.kernels, 6)
    pitch, middle, base = 84 / len(labels), (top + 16) / 2 + 6, (top + 16) / 2 - 14
    for index, label in enumerate(labels):
        x = 8 + pitch * (index + 0.5)
        dots = label == "…"
        _square(axes, (x, middle + 18), 11, label if dots else f"W{_lower(label)}", COLOURS["static"])
        if dots:
            continue
        bar = 3 + 10 * abs(math.sin(2.1 * index + 1.0)) ** 2
        axes.add_patch(Rectangle((x - 2, middle - 2), 4, bar, facecolor=SEEN, edgecolor=INK, linewidth=0.8))
        axes.text(x, middle - 3, f"π{_lower(label)}", ha="center", va="top", fontsize=9.5, color=INK)
        axes.annotate("", (50 + (x - 50) * 0.12, base), (x, middle - 8), arrowprops=ARROW)
    axes.add_patch(Rectangle((43, base - 15), 14, 14, facecolor=SEEN, edgecolor=INK, linewidth=0.8))
    axes.text(50, base - 8, "Σ π W", ha="center", va="center", fontsize=10, color=INK)
    words = "bars: the coefficients of one image (an illustration);\nthe mixed kernel is used at every position"
    axes.text(50, 1, words, ha="center", va="bottom", fontsize=9.5, color=INK, linespacing=1.3)


def _lower(digits: str) -> str:
    return digits.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _learned(axes: Axes, top: float, host: Host) -> None:
    """Draw a bank of learned kernels, all of which every position uses."""
    if host.kernels == 1:
        _taps(axes, (50, top - 22), 32, host.spec.size)
        axes.text(50, 1, "the same kernel at every position", ha="center", va="bottom", fontsize=9.5, color=INK)
        return
    labels = _shown(host.kernels, 35)
    for index, label in enumerate(labels):
        x, y = 14 + 12 * (index % 7), top - 14 - 12 * (index // 7)
        _square(axes, (x, y), 9.5, label, COLOURS["static"])
    axes.text(50, 1, "every position uses all of them;\neach is one channel between the two steps", ha="center",
              va="bottom", fontsize=9.5, color=INK, linespacing=1.3)  # fmt: skip


def _taps(axes: Axes, centre: tuple[float, float], side: float, size: int, box: bool = False) -> None:
    """Draw a size x size kernel with its centre marked, and the fixed weights of a box where there is room."""
    cell, left, lower = side / size, centre[0] - side / 2, centre[1] - side / 2
    for y in range(size):
        for x in range(size):
            middle = x == y == size // 2
            axes.add_patch(Rectangle((left + x * cell, lower + y * cell), cell, cell, edgecolor=INK, linewidth=0.8,
                                     facecolor=SEEN if middle else "white"))  # fmt: skip
            if box and size <= 5:
                weight = f"1/{size * size}" + (" − 1" if middle else "")
                axes.text(left + (x + 0.5) * cell, lower + (y + 0.5) * cell, weight, ha="center", va="center",
                          fontsize=8.5, color=INK)  # fmt: skip


# ---- what one kernel connects ----------------------------------------------------------------------------


def draw_kernel(axes: Axes, host: Host) -> None:
    """Draw input and output channels as dots, the weights of the kernel as lines, and its taps below them."""
    height = axes.get_ylim()[1]
    axes.text(50, height - 1, kernel_text(host).replace(", then ", ",\nthen "), ha="center", va="top", fontsize=10.5,
              color=INK, linespacing=1.35)  # fmt: skip
    top, bottom = height - 16, 62.0
    if isinstance(host.spec.kernel, TwoStep):
        _two_steps(axes, top, bottom, host)
    else:
        _one_step(axes, top, bottom, host)
    size = host.spec.size
    axes.text(50, 44, f"kernel size {size} × {size}", ha="center", va="bottom", fontsize=12, fontweight="bold",
              color=INK)  # fmt: skip
    _taps(axes, (50, 23.5), 8 if size == 1 else 36, size)
    if size == 1:
        axes.text(50, 16, _interaction(host.spec), ha="center", va="top", fontsize=9.5, color=INK)


def _interaction(spec: MixerSpec) -> str:
    """How positions exchange information if the kernel is 1 x 1 (paper, section 4.3)."""
    if any(step.axis == "positions" for step in spec.activation):
        return "positions interact in the activation"
    if isinstance(spec.mix, Predict):
        return "positions interact only\nthrough the coefficients"
    if isinstance(spec.bank, Dynamic) and not isinstance(spec.support, Own):
        return "positions interact only through\neach other's kernels"
    return "positions do not interact"


def _dots(axes: Axes, x: float, top: float, bottom: float, colours: Sequence[str]) -> list[float]:
    heights = [top + (bottom - top) * (index + 0.5) / len(colours) for index in range(len(colours))]
    for y, colour in zip(heights, colours, strict=True):
        axes.add_patch(Circle((x, y), 2.2, facecolor=colour, edgecolor=INK, linewidth=0.8, zorder=3))
    return heights


def _two_steps(axes: Axes, top: float, bottom: float, host: Host) -> None:
    """Draw kernels that reduce the channels to one score and expand it again; one kernel is in colour."""
    grey = "#dddddd"
    left, right = (_dots(axes, x, top, bottom, [PALETTE[0]] * 6) for x in (15, 85))
    middle = _dots(axes, 50, top, bottom, [grey, SEEN, grey, grey, grey, grey])
    for index in (0, 2, 3, 4, 5, 1):
        colour, width, order = (QUERY, 1.4, 2) if index == 1 else (grey, 0.6, 1)
        for x, y in [*((15, y) for y in left), *((85, y) for y in right)]:
            axes.plot((x, 50), (y, middle[index]), color=colour, linewidth=width, zorder=order)
    width = host.dim // host.heads
    for x, text in ((15, f"C_in = {width}"), (50, f"{host.visible[1]} kernels"), (85, f"C_out = {width}")):
        axes.text(x, bottom - 1, text, ha="center", va="top", fontsize=9.5, color=INK)
    axes.text(50, bottom - 5.5, f"in {host.heads} heads" if host.heads > 1 else "one head", ha="center", va="top",
              fontsize=9.5, color=INK)  # fmt: skip


def _one_step(axes: Axes, top: float, bottom: float, host: Host) -> None:
    """Draw the weights as lines, one colour per group of channels; a depth-wise kernel has a group per channel."""
    count = 6
    shared = min(max(1, host.groups), count // 2 if host.groups < host.dim else count)
    member = [index * shared // count for index in range(count)]
    match host.spec.kernel:
        case Full():
            pairs = [(i, j) for i in range(count) for j in range(count) if member[i] == member[j]]
            width = host.dim // host.groups
            caption = "one matrix" if host.groups == 1 else f"{host.groups} blocks of {width} channels"
        case Grouped():
            pairs = [(i, i) for i in range(count)]
            caption = f"one colour is one weight for {host.dim // host.groups} channels"
        case _:
            member, pairs = list(range(count)), [(i, i) for i in range(count)]
            caption = "one weight per channel"
    colours = [PALETTE[group % len(PALETTE)] for group in member]
    left, right = (_dots(axes, x, top, bottom, colours) for x in (22, 78))
    for i, j in pairs:
        axes.plot((22, 78), (left[i], right[j]), color=colours[i], linewidth=1.4, zorder=1)
    for x, text in ((22, f"C_in = {host.dim}"), (78, f"C_out = {host.dim}")):
        axes.text(x, bottom - 1, text, ha="center", va="top", fontsize=9.5, color=INK)
    fixed = isinstance(host.spec.bank, Box)
    axes.text(50, bottom - 5.5, "fixed" if fixed else caption, ha="center", va="top", fontsize=9.5, color=INK)
