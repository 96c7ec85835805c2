"""The paper's figures 1 to 3 for any spec: the chain, the kernel bank, the kernel's type. Needs matplotlib."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from kernelbank.analysis.chain import BankText, Link, bank, chain, shape_text
from kernelbank.analysis.equation import equation
from kernelbank.analysis.host import Host
from kernelbank.analysis.panels import ARROW, COLOURS, INK, draw_bank, draw_kernel
from kernelbank.errors import InputError
from kernelbank.files import replace_file
from kernelbank.spec import STEPS, MixerSpec
from kernelbank.spec.inventory import Grid, check_host

# Without the date of writing, so that the same spec gives the same file.
METADATA: dict[str, dict[str, None]] = {"svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}}
_LONGEST_FIRST = sorted([*STEPS, "softmax", "mean", "log"], key=len, reverse=True)
NAMES = rf"(?<![A-Za-z_{{])({'|'.join(_LONGEST_FIRST)})(?![A-Za-z0-9])"
SIGNS = {"Σ": r"\sum", "⊙": r"\odot", "∈": r"\in ", "ᵀ": "^T", "π": r"\pi", "·": r"\cdot ", "−": "-", " ": r"\,"}
INCHES = (15.0, 7.6)
DPI = 110


def draw(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int, path: Path | str) -> None:
    """Draw a spec to `path`, whose suffix is the format: .svg, .png or .pdf. The file is complete or absent.

    Raises: InputError: If the suffix is another one or the file cannot be written. SpecError: As `inventory`.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in METADATA:
        raise InputError(f"invalid figure={path}; expected a name ending in .svg, .png or .pdf")
    figure = picture(spec, dim, num_heads, grid, prefix)
    with mpl.rc_context({"svg.hashsalt": "kernelbank"}):
        try:
            replace_file(path, lambda beside: figure.savefig(beside, format=kind, dpi=DPI, metadata=METADATA[kind]))
        except OSError as error:
            raise InputError(f"invalid figure={path}: it cannot be written ({error.strerror or error}); "
                             "expected another path") from None  # fmt: skip


def picture(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0) -> Figure:
    """Return the figure of a spec: chain on the left, bank in the middle, kernel type and size on the right."""
    check_host(dim, num_heads, grid, prefix)
    host = Host(spec.at_block(0), dim, num_heads, grid, prefix)
    figure = Figure(figsize=INCHES, facecolor="white")
    figure.text(0.5, 0.96, str(spec), ha="center", fontsize=16, fontweight="bold", color=INK)
    figure.text(0.5, 0.91, mathtext(equation(spec)), ha="center", fontsize=15, color=INK)
    chain_axes, bank_axes, kernel_axes = (
        _axes(figure, left, width, title)
        for left, width, title in (
            (0.015, 0.285, "convolutions"), (0.335, 0.355, "kernel bank and selection"), (0.72, 0.265, "kernel type"),
        )
    )  # fmt: skip
    _draw_chain(chain_axes, host, chain(host), bank(host))
    draw_bank(bank_axes, spec, host, bank(host))
    draw_kernel(kernel_axes, host)
    return figure


def _axes(figure: Figure, left: float, width: float, title: str) -> Axes:
    """A panel that is 100 square units wide, empty except for its title."""
    axes = figure.add_axes((left, 0.02, width, 0.81))
    height = 100 * 0.81 * INCHES[1] / (width * INCHES[0])
    axes.set(xlim=(0, 100), ylim=(0, height), title=title, xticks=[], yticks=[])
    axes.title.set(fontsize=12, color=INK, fontweight="bold")
    axes.set_axis_off()
    return axes


def mathtext(text: str) -> str:
    """Return an equation in matplotlib's notation, with subscripts and upright names."""
    text = re.sub(NAMES, r"\\mathrm{\1}", text)
    text = re.sub(r"(?<!^)_([a-z]+)", r"_{\1}", text)
    text = re.sub(r"√(\d+|[a-zC]_?\w?)", r"\\sqrt{\1}", text)
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    return f"${text}$"


def _draw_chain(axes: Axes, host: Host, links: tuple[Link, ...], origin: BankText) -> None:
    """Draw boxes from top to bottom with the shapes between them, and the kernels of the bank coming from the right."""
    height = axes.get_ylim()[1]
    pitch = min((height - 18) / len(links), 34)
    box, gap, centre = 0.58 * pitch, 0.42 * pitch, 40
    top = height - 5 - (height - 18 - pitch * len(links)) / 3
    shapes = [(host.tokens, host.dim), *(link.shape for link in links)]
    axes.text(centre, top, "x", ha="center", va="bottom", fontsize=13, style="italic", color=INK)
    for index, link in enumerate(links):
        upper = top - index * pitch - gap
        axes.annotate("", (centre, upper), (centre, upper + gap), arrowprops=ARROW)
        _write(axes, centre + 2.5, upper + 0.38 * gap, shape_text(shapes[index]), 9.5, ha="left")
        if origin.reads == index:
            axes.annotate("", (99, upper + 0.78 * gap), (centre, upper + 0.78 * gap), arrowprops=ARROW)
            _write(axes, 88, upper + 0.78 * gap + 2.2, "to the bank", 8.5)
        _draw_link(axes, link, upper, box)
    bottom = top - len(links) * pitch
    axes.annotate("", (centre, bottom - 8), (centre, bottom), arrowprops=ARROW)
    _write(axes, centre + 2.5, bottom - 3.5, shape_text(shapes[-1]), 9.5, ha="left")
    axes.text(centre, bottom - 8.5, "y", ha="center", va="top", fontsize=13, style="italic", color=INK)


def _draw_link(axes: Axes, link: Link, upper: float, box: float) -> None:
    axes.add_patch(FancyBboxPatch((2, upper - box), 76, box, boxstyle="round,pad=0,rounding_size=2",
                                  facecolor=COLOURS[link.kind], edgecolor=INK, linewidth=1))  # fmt: skip
    _write(axes, 40, upper - 0.32 * box, link.title, 10.5)
    _write(axes, 40, upper - 0.7 * box, link.detail, 9)
    if link.kernels:
        axes.annotate("", (78.5, upper - box / 2), (99, upper - box / 2), arrowprops=ARROW)
        axes.text(89, upper - box / 2 + 1, link.kernels, ha="center", va="bottom", fontsize=12, style="italic",
                  color=INK)  # fmt: skip


def _write(axes: Axes, x: float, y: float, text: str, size: float, *, ha: str = "center") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=INK)
