"""A support gives sets of coordinates: strided ones are honoured by every path, the definition included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from equality import normal
from torch import Tensor

from kernelbank import MixerSpec
from kernelbank.ops import geometry as geometries
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import Geometry, axis_visibility, visibility
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import MIXER_PATHS, triton, windows
from kernelbank.ops.paths.toeplitz import dense
from kernelbank.spec import Support, support
from kernelbank.spec.axes import All, Dilated, Neighborhood, Own, Relative, Window
from kernelbank.spec.inventory import inventory

CALL, CPU = Call(dtype=torch.float64, grad=True), Machine(reason="a test")


@dataclass(frozen=True)
class Strided:
    """Every `step`-th coordinate, counted from the query's own."""

    step: int

    def coordinates(self, length: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(at % self.step, length, self.step)) for at in range(length))


@dataclass(frozen=True)
class Uneven:
    """Sets without a common step that overlap: a coordinate sees itself and its mirror image."""

    def coordinates(self, length: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({at, length - 1 - at, 0})) for at in range(length))


@pytest.fixture(autouse=True)
def _new_supports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def seen(value: Support, length: int) -> tuple[tuple[int, ...], ...]:
        return value.coordinates(length) if isinstance(value, (Strided, Uneven)) else support.seen(value, length)

    for module in (geometries, windows, triton):
        monkeypatch.setattr(module, "seen", seen)
    yield
    windows._group.cache_clear()


def context(text: str, value: Support, grid: tuple[int, int], prefix: int) -> tuple[Context, dict[str, Tensor]]:
    spec = MixerSpec.parse(text)
    sides = grid if isinstance(spec.position, Relative) else None
    params = {
        entry.name: normal(*entry.shape, seed=number).mul_(0.5).requires_grad_()
        for number, entry in enumerate(inventory(spec, 8, 2, grid, prefix))
    }
    return Context(spec, 8, 2, Geometry(value, grid, prefix, sides), position=dense), params


@pytest.mark.parametrize("value", [Strided(2), Strided(3), Uneven()])
@pytest.mark.parametrize("length", [1, 4, 5, 7])
def test_visibility_along_an_axis_is_the_set(value: Strided | Uneven, length: int) -> None:
    V = axis_visibility(value, length, None)
    assert [row.nonzero()[:, 0].tolist() for row in V] == [list(region) for region in value.coordinates(length)]


@pytest.mark.parametrize("value", [All(), Own(), Window(3, 1), Window(3, 1, "timm"), Dilated(3), Neighborhood(3)])
def test_sets_of_every_support_ascend(value: Support) -> None:
    for region in support.seen(value, 7):
        assert type(region) is tuple and list(region) == sorted(set(region)) and all(0 <= at < 7 for at in region)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("value", [Strided(2), Strided(3), Uneven()])
@pytest.mark.parametrize(
    "text", ["vit", "vit_relpos", "vit activation=relu,count", "vit_relpos activation=layernorm,count", "dwsa",
             "dwsa position=none", "dwsa position=none mix=pool", "vit3"]
)  # fmt: skip
def test_every_path_equals_the_definition_and_a_mask(text: str, value: Support, prefix: int) -> None:
    """The same visibility as a mask over support `all` is the independent answer."""
    grid = (4, 5)
    s, params = context(text, value, grid, prefix)
    x = torch.randn(2, s.geo.tokens, 8, dtype=torch.float64, requires_grad=True)
    upstream, inputs = torch.randn_like(x), [x, *params.values()]

    def run(path: str, s: Context) -> list[Tensor]:
        y = MIXER_PATHS[path].run(x, params, s)
        grads = torch.autograd.grad((y * upstream).sum(), inputs, allow_unused=True)
        return [y, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))]

    mask = visibility(value, grid, prefix)[None, None]
    masked = replace(s, geo=replace(s.geo, support=All()), mask=mask)
    expected = run("vectorised", masked)
    supported = [name for name, path in MIXER_PATHS.items() if path.unsupported(s, CALL, CPU) is None]
    assert {"reference", "vectorised", "conv"} <= {*supported}
    assert ("windows" in supported) == (isinstance(value, Strided))
    for name in supported:
        for ours, theirs in zip(run(name, s), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), name


def test_regions_of_one_shape_are_one_group() -> None:
    shapes = [(group.offsets, len(group.corners)) for group in windows.groups(Strided(2), (4, 5))]
    assert shapes == [(((0, 2), (0, 2, 4)), 2), (((0, 2), (0, 2)), 2)]
    assert not any(group.contiguous for group in windows.groups(Strided(2), (4, 5)))
    assert all(group.contiguous for group in windows.groups(Window(3, 1), (4, 5)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(Strided(2), True), (Window(3, 1), True), (Dilated(3), True), (Uneven(), False), (Neighborhood(3), False),
     (All(), False), (Own(), False)],
)  # fmt: skip
def test_regions_are_sets_that_see_themselves_alone(value: Support, expected: bool) -> None:
    assert windows.has_regions(value, (7, 8)) == expected
