"""The chain of a spec drawn in text: boxes on the left, the kernel bank that feeds them on the right."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernelbank.analysis.chain import BankText, Link, bank, chain, shape_text
from kernelbank.analysis.host import Host
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid

# Columns: of the vertical line through the chain, between the boxes, and of the line below the bank's box.
STEM, GAP, TRUNK = 6, 9, 5


def diagram(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0) -> str:
    """Return the drawing, with shapes on its arrows: tokens x channels, or heads x tokens x kernels seen."""
    host = Host(spec.at_block(0), dim, num_heads, grid, prefix)
    links, origin, canvas = chain(host), bank(host), _Canvas()
    width = max(len(text) for link in links for text in (link.title, link.detail)) + 4
    column = width + GAP
    shapes = [(host.tokens, dim), *(link.shape for link in links)]
    canvas.put(0, STEM, "x")
    row, tops = 1, list[int]()
    for index, link in enumerate(links):
        canvas.put(row, STEM, f"│ {shape_text(shapes[index])}")
        row += 1
        if origin.reads == index:
            canvas.put(row, STEM, "├" + "─" * (column + TRUNK - STEM - 1) + "┐")
            canvas.put(row + 1, column + TRUNK, "▼")
            row += 1
        canvas.put(row, STEM, "▼")
        tops.append(row + 1)
        row = canvas.box(row + 1, 0, width, (link.title, link.detail))
    canvas.put(row, STEM, f"│ {shape_text(shapes[-1])}")
    canvas.put(row + 1, STEM, "▼")
    canvas.put(row + 2, STEM, "y")
    _draw_bank(canvas, links, tops, origin, width)
    return canvas.text()


def _draw_bank(canvas: _Canvas, links: tuple[Link, ...], tops: list[int], origin: BankText, width: int) -> None:
    column = width + GAP
    feeds = {top + 1: link.kernels for link, top in zip(links, tops, strict=True) if link.kernels}
    top = tops[origin.reads] if origin.reads is not None else min(feeds, default=tops[0] + 1) - 1
    inside = max(len(line) for line in (origin.title, *origin.lines)) + 4
    bottom = canvas.box(top, column, inside, (origin.title, *origin.lines))
    below = [row for row in feeds if row >= bottom]
    if below:
        canvas.put(bottom - 1, column + TRUNK, "┬")
        for row in range(bottom, below[-1]):
            canvas.put(row, column + TRUNK, "│")
    for row, letter in feeds.items():
        arrow = f"◀── {letter} "
        if row < bottom:
            canvas.put(row, width, arrow.ljust(GAP, "─"))
        else:
            canvas.put(row, width, arrow.ljust(GAP + TRUNK, "─") + ("┘" if row == below[-1] else "┤"))


@dataclass
class _Canvas:
    """Characters by row and column."""

    rows: dict[int, dict[int, str]] = field(default_factory=dict)

    def put(self, row: int, column: int, text: str) -> None:
        """Write `text` to the right from a place."""
        self.rows.setdefault(row, {}).update(enumerate(text, column))

    def box(self, row: int, column: int, width: int, lines: tuple[str, ...]) -> int:
        """Draw a box and return the row below it."""
        edge = "─" * (width - 2)
        framed = [f"┌{edge}┐", *(f"│ {line:<{width - 4}} │" for line in lines), f"└{edge}┘"]
        for offset, line in enumerate(framed):
            self.put(row + offset, column, line)
        return row + len(framed)

    def text(self) -> str:
        """Return the rows without trailing blanks."""
        last = range(max(self.rows) + 1)
        rows = (self.rows.get(row, {}) for row in last)
        return "\n".join("".join(row.get(c, " ") for c in range(max(row, default=-1) + 1)).rstrip() for row in rows)
