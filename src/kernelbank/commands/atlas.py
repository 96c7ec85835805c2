"""``kernelbank atlas``: the paper's table, the registered models, one record in full, its figure, and the proofs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernelbank.analysis.cost import Cost, model_cost
from kernelbank.analysis.explain import describe, render
from kernelbank.atlas import ROWS
from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require
from kernelbank.spec import MixerSpec
from kernelbank.zoo import MODELS, published_figure

COLUMNS = ("bank", "support", "mix", "kernel", "size", "activation", "position", "frame")
LAYOUTS = (
    (("row", *COLUMNS),),
    (("row", "bank", "support", "mix", "kernel"), ("", "size", "activation", "position", "frame")),
    (("row", "", "", ""), ("bank", "support", "mix", "kernel"), ("size", "activation", "position", "frame")),
)
"""The lines that a row of the table takes, widest first: the first that fits the terminal is used."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the paper's table with every known mixer, the registered models, or one record in full: its cells,
    equation, picture, parameters and cost."""

    record: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECORD")] = ()
    """A row of the table and cells to change, such as: vit kernel=depthwise mix=mean"""
    dim: int = 384
    """Channels C of the record shown."""
    heads: int = 6
    """Heads h of the record shown."""
    grid: Annotated[tuple[int, int], tyro.conf.arg(metavar="H W")] = (14, 14)
    """Height and width of the grid."""
    prefix: int = 0
    """Tokens before the grid: class token and registers."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the record to FILE: .svg, .png or .pdf."""
    json: bool = False
    """Print JSON."""
    models: bool = False
    """Print the registered models: parameters, cost of one image and what their sources state."""
    prove: bool = False
    """Check the identities behind the table; exit code 1 if one fails."""


HOST = ("dim", "heads", "grid", "prefix")


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises SpecError and InputError."""
    options = read_options(Options, "atlas", argv)
    _check(options)
    if options.prove:
        return _prove(options.json)
    if options.models:
        _show_models(options.json)
    elif options.record:
        _show_record(options)
    elif options.json:
        _print_json(_rows())
    else:
        _show_table()
    return 0


def _check(options: Options) -> None:
    """Options that do not go together. Raises UsageError."""
    if options.prove and options.record:
        raise UsageError("atlas", "--prove checks the identities of the whole table: it takes no record")
    if options.models and (options.record or options.prove):
        raise UsageError("atlas", "--models prints the registered models: it takes no record, and no --prove")
    if not options.record:
        if options.figure is not None:
            raise UsageError("atlas", "--figure draws one record: name it, such as: atlas vit --figure vit.svg")
        default = Options()
        if changed := [name for name in HOST if getattr(options, name) != getattr(default, name)]:
            raise UsageError("atlas", f"--{changed[0]} belongs to one record: name it, such as: atlas vit")


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


# ---- the table -------------------------------------------------------------------------------------------


def _rows() -> list[dict[str, Any]]:
    return [
        {"row": name, **row.cells, "title": row.title, "cite": row.cite, "note": row.note,
         "published": [asdict(figure) for figure in row.published]}
        for name, row in ROWS.items()
    ]  # fmt: skip


def _show_table() -> None:
    cells = {name: {"row": name, "": "", **MixerSpec.parse(name).text} for name in ROWS}
    tables = [_table(cells, layout) for layout in LAYOUTS]
    console = _console_for(tables)
    widths = (Console(width=10_000, height=1).measure(table).maximum for table in tables)
    console.print(next((t for t, width in zip(tables, widths, strict=True) if width <= console.width), tables[-1]))
    console.print("kernelbank atlas ROW shows one in full, ROW field=value one with a cell changed", style="dim")


def _table(cells: Mapping[str, Mapping[str, str]], layout: tuple[tuple[str, ...], ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for headings in zip(*layout, strict=True):
        table.add_column("\n".join(headings), overflow="fold")
    for text in cells.values():
        for index, line in enumerate(layout):
            shown = (Text(text[c], style="bold") if c == "row" else _dash(text[c]) for c in line)
            table.add_row(*shown, style="dim" if 0 < index == len(layout) - 1 else "")
    return table


def _dash(text: str) -> str:
    return "-" if text == "none" else text


# ---- the models ------------------------------------------------------------------------------------------


def _show_models(as_json: bool) -> None:
    costs = {name: model_cost(spec) for name, spec in MODELS.items()}
    if as_json:
        _print_json([
            {"model": name, "mixer": MODELS[name].mixer, "mlp": MODELS[name].mlp, **asdict(cost),
             "parameter_bytes": cost.parameter_bytes(), "activation_bytes": cost.activation_bytes(),
             "published": None if (figure := published_figure(name)) is None else asdict(figure)}
            for name, cost in costs.items()
        ])  # fmt: skip
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, justify, _ in MODEL_COLUMNS:
        table.add_column(heading, justify=justify, overflow="fold")
    for name, cost in costs.items():
        table.add_row(*(cell(name, cost) for _, _, cell in MODEL_COLUMNS))
    console = _console_for([table])
    console.print(table)
    console.print("one image; weights in float32; multiplies are elementwise", style="dim")


def _console_for(tables: list[Table]) -> Console:
    """A terminal keeps its width; a file or pipe gets the width that the first of `tables` needs."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=max(80, Console(width=10_000, height=1).measure(tables[0]).maximum))


def _stated(name: str) -> str:
    """What the source of a model states: ``DeiT-S: 22.05 M, 4.61 G``."""
    figure = published_figure(name)
    if figure is None:
        return "-"
    return f"{figure.model}: {figure.params} M, {figure.macs} G"


MODEL_COLUMNS: tuple[tuple[str, Literal["left", "right"], Callable[[str, Cost], str | Text]], ...] = (
    ("model", "left", lambda name, cost: Text(name, style="bold")),
    ("mixer", "left", lambda name, cost: MODELS[name].mixer or ""),
    ("params", "right", lambda name, cost: f"{cost.params:,}"),
    ("MACs", "right", lambda name, cost: f"{cost.macs / 1e9:.3f} G"),
    ("of modules", "right", lambda name, cost: f"{cost.macs_modules / 1e9:.3f} G"),
    ("multiplies", "right", lambda name, cost: f"{cost.multiplies / 1e6:.2f} M"),
    ("activations", "right", lambda name, cost: f"{cost.activations / 1e6:.2f} M"),
    ("weights", "right", lambda name, cost: f"{cost.parameter_bytes() / 2**20:.1f} MiB"),
    ("published", "left", lambda name, cost: _stated(name)),
)


# ---- one record ------------------------------------------------------------------------------------------


def _show_record(options: Options) -> None:
    text = " ".join(options.record)
    described = describe(text, options.dim, options.heads, options.grid, options.prefix)
    if options.figure is not None:
        _draw(MixerSpec.parse(text), options, options.figure)
    if options.json:
        _print_json(described)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(100, *map(len, described["diagram"].splitlines())) + 20)
    render(described, console)
    if options.figure is not None:
        console.print(f"figure written to {options.figure}", soft_wrap=True)


def _draw(spec: MixerSpec, options: Options, path: Path) -> None:
    require("--figure", "report", "matplotlib")
    from kernelbank.analysis.figure import draw  # noqa: PLC0415 - matplotlib takes half a second

    draw(spec, options.dim, options.heads, options.grid, options.prefix, path)


# ---- proofs ----------------------------------------------------------------------------------------------


def _prove(as_json: bool) -> int:
    from kernelbank.analysis.proofs import PROOFS, prove  # noqa: PLC0415 - imports torch

    console, shown, failed = Console(highlight=False), list[dict[str, Any]](), 0
    width = max(map(len, PROOFS))
    if not as_json:
        console.print(f"{'identity':<{width}}  max error  verdict  statement", style="bold", soft_wrap=True)
    for name in PROOFS:
        proof = prove(name)
        verdict = "holds" if proof.holds else "fails"
        failed += not proof.holds
        if as_json:
            error = proof.error if math.isfinite(proof.error) else str(proof.error)
            shown.append({"name": name, "statement": proof.statement, "error": error,
                          "tolerance": proof.tolerance, "holds": proof.holds})  # fmt: skip
        else:
            style = "green" if proof.holds else "bold red"
            console.print(f"{name:<{width}}  {proof.error:9.1e}  ", end="", soft_wrap=True)
            console.print(f"{verdict:<7}", style=style, end="", soft_wrap=True)
            console.print(f"  {proof.statement}", soft_wrap=True)
            sys.stdout.flush()
    if as_json:
        _print_json(shown)
    else:
        console.print(f"{len(PROOFS) - failed} of {len(PROOFS)} hold")
    return 1 if failed else 0
