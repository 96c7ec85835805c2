"""One spec in full: its cells, equation, diagram, parameters, weight generator and cost. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kernelbank.analysis.chain import shape_text
from kernelbank.analysis.cost import cost
from kernelbank.analysis.diagram import diagram
from kernelbank.analysis.equation import definitions, equation
from kernelbank.analysis.host import Host
from kernelbank.atlas import ROWS
from kernelbank.spec import Depthwise, Dynamic, Full, Grouped, MixerSpec, Predict, Static, TwoStep
from kernelbank.spec.inventory import Grid, inventory, resolve
from kernelbank.spec.text import words

__all__ = ["Generator", "definitions", "describe", "diagram", "equation", "generator", "render"]

SIZES = "C_in = C_out = C"


@dataclass(frozen=True)
class Generator:
    """The paper's argument of section 4.3: the weights of a spec's generator (without biases), beside those of a
    generator that would emit the whole kernel. Formulas are sums of products of the symbols."""

    formula: str
    params: int
    whole: str
    whole_formula: str
    whole_params: int

    @property
    def ratio(self) -> float:
        """How many times larger the generator of the whole kernel is."""
        return self.whole_params / self.params


def generator(spec: MixerSpec, dim: int, num_heads: int) -> Generator | None:
    """Return the weight generator (or coefficient predictor) of a spec, or None where nothing depends on the image.

    H x W in the paper's C*H*W*C_in*C_out is the size of the kernel: k*k here.
    """
    weights_of_spec = _generated(spec, dim, num_heads)
    if weights_of_spec is None:
        return None
    area, taps = spec.size**2, "" if spec.size == 1 else f"·{spec.size}·{spec.size}"
    formula, params = weights_of_spec
    if isinstance(spec.mix, Predict) and not isinstance(spec.kernel, Full):
        weights, kind = _one_weight_each(spec, dim, num_heads)
        return Generator(formula, params, "the mixed kernel", f"C{taps}·{kind}", dim * area * weights)
    groups = resolve(spec.kernel.groups, dim, num_heads) if isinstance(spec.kernel, Full) else 1
    split = "" if groups == 1 else f"/{groups}"
    return Generator(formula, params, "a full kernel", f"C{taps}·C_in·C_out{split}", dim * area * dim * dim // groups)


def _generated(spec: MixerSpec, dim: int, num_heads: int) -> tuple[str, int] | None:
    """The formula and the number of weights of the layers that generate from the image."""
    match spec.bank, spec.mix:
        case Dynamic(r=r), _:
            weights, kind = _one_weight_each(spec, dim, num_heads)
            taps = "" if spec.size == 1 else f"·{spec.size}·{spec.size}"
            outputs = [(f"{taps}·{kind}", weights * spec.size**2)]
            if isinstance(spec.kernel, TwoStep):
                outputs.append(("·C_out", dim))
        case Static(K=K), Predict(r=r):
            outputs = [("·K", resolve(K, dim, num_heads))]
        case _:
            return None
    width, sign = (dim, "C") if r is None else (max(1, dim // r), f"(C/{r})")
    first = [] if r is None else [f"C·{sign}"]
    formula = " + ".join([*first, *(sign + output for output, _ in outputs)])
    return formula, (0 if r is None else dim * width) + width * sum(count for _, count in outputs)


def _one_weight_each(spec: MixerSpec, dim: int, num_heads: int) -> tuple[int, str]:
    """The weights per tap of a kernel that is not full, and their symbol."""
    match spec.kernel:
        case TwoStep():
            return dim, "C_in"
        case Grouped(G=groups):
            return resolve(groups, dim, num_heads), "G"
        case Depthwise():
            return dim, "C"
        case _:
            return dim, "C_in"


# ---- the whole spec --------------------------------------------------------------------------------------


def describe(text: str | MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0) -> dict[str, Any]:
    """Return everything about one spec at a size, as values that JSON can hold. If the windows alternate, `cost` is
    that of an even block and `cost_odd_block` that of an odd one.

    Raises: SpecError: If the spec is invalid or does not fit the size.
    """
    spec = text if isinstance(text, MixerSpec) else MixerSpec.parse(text)
    host = Host(spec.at_block(0), dim, num_heads, grid, prefix)
    tensors = inventory(spec, dim, num_heads, grid, prefix)
    even, odd = (cost(spec.at_block(block), dim, num_heads, grid, prefix) for block in (0, 1))
    generated = generator(spec, dim, num_heads)
    return {
        "spec": str(spec),
        "row": _row(words(text)[0]) if isinstance(text, str) else None,
        "host": {"dim": dim, "num_heads": num_heads, "grid": list(grid), "prefix": prefix},
        "cells": spec.text,
        "resets": [asdict(reset) for reset in spec.resets],
        "roles": list(spec.roles),
        "equation": equation(spec),
        "where": list(definitions(spec)),
        "diagram": diagram(spec, dim, num_heads, grid, prefix),
        "kernels": {"bank": host.kernels, "fewest_seen": host.visible[0], "most_seen": host.visible[1]},
        "parameters": [
            {"name": t.name, "shape": list(t.shape), "numel": t.numel, "init": t.init, "buffer": t.buffer}
            for t in tensors
        ],
        "generator": None if generated is None else {**asdict(generated), "ratio": generated.ratio},
        "cost": asdict(even),
        "cost_odd_block": None if odd == even else asdict(odd),
    }


def _row(name: str) -> dict[str, Any]:
    row = ROWS[name]
    published = [asdict(figure) for figure in row.published]
    return {"name": name, "title": row.title, "cite": row.cite, "note": row.note, "published": published}


def render(description: Mapping[str, Any], console: Console) -> None:
    """Print what `describe` returned."""
    for section in (_heading, _cells, _equation, _diagram, _parameters, _generator, _cost):
        console.print(section(description))


def _plain(text: str) -> Text:
    return Text(text, overflow="fold")


def _titled(title: str, *parts: RenderableType) -> Group:
    return Group(Text(title, style="bold"), *(Padding(part, (0, 0, 0, 2), expand=False) for part in parts), "")


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _heading(description: Mapping[str, Any]) -> Group:
    row, host = description["row"], description["host"]
    lines: list[RenderableType] = []
    if row:
        based = "" if description["spec"] == row["name"] else f"from row {row['name']}: "
        lines.append(_plain(f"{based}{row['title']}"))
        lines.append(_plain(row["cite"]))
        lines += [_plain(f"note: {row['note']}")] if row["note"] else []
        lines += [_published(row)] if row["published"] else []
    grid = shape_text(tuple(host["grid"]))
    lines.append(_plain(f"at C = {host['dim']}, {host['num_heads']} heads, a {grid} grid, prefix {host['prefix']}"))
    return _titled(description["spec"], *lines)


def _published(row: Mapping[str, Any]) -> Table:
    table = _table(f"published ({row['name']})", "params", "MACs", "top-1", "source", right=("params", "MACs", "top-1"))
    for figure in row["published"]:
        params, macs, top1 = (figure[key] for key in ("params", "macs", "top1"))
        numbers = [f"{value}{unit}" if value is not None else "-"
                   for value, unit in ((params, "M"), (macs, "G"), (top1, "%"))]  # fmt: skip
        table.add_row(figure["model"], *numbers, figure["source"])
    return table


def _cells(description: Mapping[str, Any]) -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in description["cells"].items():
        table.add_row(name, value)
    table.add_row("roles", ", ".join(description["roles"]) or "none")
    for reset in description["resets"]:
        table.add_row("reset", f"{reset['field']}: {reset['old']} → {reset['new']}")
    return _titled("cells", table)


def _equation(description: Mapping[str, Any]) -> Group:
    where = (Padding(_plain(line), (0, 0, 0, 2), expand=False) for line in description["where"])
    return _titled("equation", Text(description["equation"], style="bold", overflow="fold"), *where)


def _diagram(description: Mapping[str, Any]) -> Group:
    return _titled("chain", Text(description["diagram"], no_wrap=True, overflow="ignore"))


def _parameters(description: Mapping[str, Any]) -> Group:
    if not description["parameters"]:
        return _titled("parameters", _plain("none"))
    table = _table("name", "shape", "numbers", "init", right=("numbers",))
    for tensor in description["parameters"]:
        init = tensor["init"] + (", a buffer" if tensor["buffer"] else "")
        table.add_row(tensor["name"], shape_text(tuple(tensor["shape"])), f"{tensor['numel']:,}", init)
    return _titled("parameters", table)


def _generator(description: Mapping[str, Any]) -> Group:
    weights = description["generator"]
    if weights is None:
        return _titled("weight generator", _plain("none: no kernel depends on the image"))
    table = _table("", "formula", "weights", right=("weights",))
    table.add_row("this spec", weights["formula"], f"{weights['params']:,}")
    table.add_row(weights["whole"], weights["whole_formula"], f"{weights['whole_params']:,}")
    fewer = f"{SIZES}; {weights['ratio']:,.1f} times fewer weights, without biases"
    return _titled("weight generator", table, _plain(fewer))


def _cost(description: Mapping[str, Any]) -> Group:
    even, odd = description["cost"], description["cost_odd_block"]
    blocks = {"": even} if odd is None else {"even block": even, "odd block": odd}
    counts = {"params": "parameters", "macs": "MACs", "macs_modules": "MACs of modules only",
              "multiplies": "elementwise multiplies", "activations": "activations written"}  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=odd is not None, header_style="dim")
    table.add_column("")
    for block in blocks:
        table.add_column(block, justify="right")
    for key, name in counts.items():
        table.add_row(name, *(f"{count[key]:,}" for count in blocks.values()))
    return _titled("cost of one image", table)
