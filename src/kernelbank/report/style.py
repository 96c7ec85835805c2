"""The style of every figure: colours, dashes, frames, and how a figure is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kernelbank.files import replace_file

# Okabe and Ito's palette, which people with any common colour vision deficiency can tell apart; black is the baseline.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
COLOURS = ("black", *PALETTE)
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (7, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches, without a window."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame_epochs(panel: Axes, title: str) -> None:
    """Set the title, whole epochs on the horizontal axis, and horizontal grid lines."""
    panel.set_title(title, fontsize=11)
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(axis="y", color="0.9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def write_figure(figure: Figure, path: Path) -> None:
    """Write the figure, completely or not at all. The suffix of `path` determines the format; the default is PNG."""
    kind = path.suffix.removeprefix(".") or "png"
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=160, format=kind))
