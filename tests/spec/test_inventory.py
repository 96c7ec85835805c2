"""Exact sizes of published models from the inventory alone, and every tensor of every row as a golden list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernelbank.atlas import ROWS
from kernelbank.spec import MixerSpec, SpecError
from kernelbank.spec.inventory import inventory

GOLDEN = Path(__file__).parents[1] / "golden" / "inventory.txt"


def listing() -> str:
    lines = []
    for row in ROWS:
        lines.append(f"{row} (C=64, h=2, grid=(7, 9), prefix=1)")
        for t in inventory(MixerSpec.parse(row), 64, 2, (7, 9), 1):
            lines.append(f"  {t.name} {'x'.join(map(str, t.shape))} {t.init}{' buffer' if t.buffer else ''}")
    return "\n".join(lines) + "\n"


def test_every_tensor_of_every_row_is_the_golden_one() -> None:
    """A changed name, shape or initialisation shows as a diff; UPDATE_GOLDEN=1 writes the file anew."""
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(listing())
    assert listing() == GOLDEN.read_text()


@pytest.mark.parametrize(("text", "kwargs", "message"), [
    ("vit", {"dim": 10, "num_heads": 3}, "invalid dim=10; expected a multiple of 3, the number of heads"),
    ("dwsa", {"dim": 10, "num_heads": 3}, "invalid dim=10; expected a multiple of 3, the number of heads"),
    ("vit", {"dim": 0}, "invalid dim=0; expected a whole number >= 1"),
    ("vit", {"grid": (2, -1)}, "invalid grid width=-1"),
])  # fmt: skip
def test_hosts_that_cannot_hold_the_spec_are_refused(text: str, kwargs: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        inventory(MixerSpec.parse(text), **({"dim": 8, "num_heads": 2, "grid": (2, 2)} | kwargs))


def test_heads_matter_only_where_the_spec_has_them() -> None:
    assert inventory(MixerSpec.parse("conv"), 10, 3, (2, 2))
