"""What ``kernelbank atlas`` prints: the table of all rows, the registered models, and one spec in full. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelbank.analysis.cost import Cost, model_cost
from kernelbank.analysis.describe import describe, render
from kernelbank.atlas import ROWS
from kernelbank.errors import require
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid
from kernelbank.text import printable
from kernelbank.zoo import MODELS, published_figure

COLUMNS = ("bank", "support", "mix", "kernel", "size", "activation", "position", "frame")
LAYOUTS = (
    (("row", *COLUMNS),),
    (("row", "bank", "support", "mix", "kernel"), ("", "size", "activation", "position", "frame")),
    (("row", "", ""), ("bank", "support", "mix"), ("frame", "activation", "kernel"), ("size", "", "position")),
)
"""The printed lines of a row of the table, widest layout first: the first one that fits the terminal is used."""


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _console_for(tables: list[Table]) -> Console:
    """A terminal keeps its width; a file or pipe gets the width that the first of `tables` needs."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=max(80, Console(width=10_000, height=1).measure(tables[0]).maximum))


# ---- the table -------------------------------------------------------------------------------------------


def show_table(as_json: bool) -> int:
    """Print every row of the atlas, or all of them as JSON; return 0."""
    if as_json:
        _print_json([
            {"row": name, **row.cells, "title": row.title, "cite": row.cite, "note": row.note,
             "published": [asdict(figure) for figure in row.published]}
            for name, row in ROWS.items()
        ])  # fmt: skip
        return 0
    cells = {name: {"row": name, "": "", **MixerSpec.parse(name).text} for name in ROWS}
    tables = [_table(cells, layout) for layout in LAYOUTS]
    console = _console_for(tables)
    widths = (Console(width=10_000, height=1).measure(table).maximum for table in tables)
    console.print(next((t for t, width in zip(tables, widths, strict=True) if width <= console.width), tables[-1]))
    console.print("kernelbank atlas ROW shows a row in full, and ROW FIELD=VALUE shows it with a changed cell",
                  style="dim")  # fmt: skip
    return 0


def _table(cells: Mapping[str, Mapping[str, str]], layout: tuple[tuple[str, ...], ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for headings in zip(*layout, strict=True):
        table.add_column("\n".join(headings), overflow="fold")
    for text in cells.values():
        for index, line in enumerate(layout):
            entries = (Text(text[c], style="bold") if c == "row" else _dash(text[c]) for c in line)
            table.add_row(*entries, style="dim" if 0 < index == len(layout) - 1 else "")
    return table


def _dash(text: str) -> str:
    return "-" if text == "none" else text


# ---- the models ------------------------------------------------------------------------------------------


def show_models(as_json: bool) -> int:
    """Print the registered models with their cost beside the published figures; return 0."""
    costs = {name: model_cost(spec) for name, spec in MODELS.items()}
    if as_json:
        _print_json([
            {"model": name, "mixer": MODELS[name].mixer, "mlp": MODELS[name].mlp, **asdict(cost),
             "parameter_bytes": cost.parameter_bytes(), "activation_bytes": cost.activation_bytes(),
             "published": None if (figure := published_figure(name)) is None else asdict(figure)}
            for name, cost in costs.items()
        ])  # fmt: skip
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, justify, _ in MODEL_COLUMNS:
        table.add_column(heading, justify=justify, overflow="fold")
    for name, cost in costs.items():
        table.add_row(*(cell(name, cost) for _, _, cell in MODEL_COLUMNS))
    console = _console_for([table])
    console.print(table)
    console.print("cost of one image; weights in float32; multiplies are elementwise", style="dim")
    return 0


def _published(name: str) -> str:
    """The figures that the source of a model publishes: ``DeiT-S: 22.05 M, 4.61 G``."""
    figure = published_figure(name)
    return "-" if figure is None else f"{figure.model}: {figure.params} M, {figure.macs} G"


MODEL_COLUMNS: tuple[tuple[str, Literal["left", "right"], Callable[[str, Cost], str | Text]], ...] = (
    ("model", "left", lambda name, cost: Text(name, style="bold")),
    ("mixer", "left", lambda name, cost: MODELS[name].mixer or ""),
    ("params", "right", lambda name, cost: f"{cost.params:,}"),
    ("MACs", "right", lambda name, cost: f"{cost.macs / 1e9:.3f} G"),
    ("of modules", "right", lambda name, cost: f"{cost.macs_modules / 1e9:.3f} G"),
    ("multiplies", "right", lambda name, cost: f"{cost.multiplies / 1e6:.2f} M"),
    ("activations", "right", lambda name, cost: f"{cost.activations / 1e6:.2f} M"),
    ("weights", "right", lambda name, cost: f"{cost.parameter_bytes() / 2**20:.1f} MiB"),
    ("published", "left", lambda name, cost: _published(name)),
)


# ---- one spec --------------------------------------------------------------------------------------------


def show_spec(text: str, *, dim: int, heads: int, grid: Grid, prefix: int, figure: Path | None, as_json: bool) -> int:
    """Print the spec of `text` in full, draw it to `figure` if that is given, and return 0.

    Raises: SpecError: If the spec is invalid or does not fit the sizes. InputError: If the figure cannot be drawn.
    """
    description = describe(text, dim, heads, grid, prefix)
    if figure is not None:
        require("--figure", "report", "matplotlib")
        draw: Callable[..., None] = import_module("kernelbank.analysis.figure").draw  # matplotlib takes half a second
        draw(MixerSpec.parse(text), dim, heads, grid, prefix, figure)
    if as_json:
        _print_json(description)
        return 0
    _render(description)
    if figure is not None:
        print(f"figure written to {printable(figure)}")
    return 0


def _render(description: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(100, *map(len, description["diagram"].splitlines())) + 20)
    render(description, console)
