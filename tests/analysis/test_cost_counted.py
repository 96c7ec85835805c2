"""The closed form against what torch counts when the mixer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernelbank import Mixer, MixerSpec, use_path
from kernelbank.analysis.cost import backbone_cost, cost
from kernelbank.atlas import ROWS, Skeleton
from kernelbank.nn.backbone import build

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}


class Written(TorchDispatchMode):
    """Counts the numbers that matrix products and convolutions write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.total += result.numel()
        return result


GRID = (6, 5)  # one window, so that no mask hides what the definition does not count


@contextmanager
def counting() -> Iterator[tuple[FlopCounterMode, Written]]:
    """On the path that applies every kernel by a convolution."""
    with use_path("conv", "linear"), FlopCounterMode(display=False) as flops, Written() as written:
        with torch.no_grad():
            yield flops, written


@pytest.mark.parametrize("row", ROWS)
def test_multiply_adds_and_activations_of_every_row_are_those_counted(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(0)
    mixer = Mixer(spec, 64, 4, GRID).eval()
    with counting() as (flops, written):
        mixer(torch.randn(1, 30, 64))
    assert 2 * cost(spec, 64, 4, GRID).macs == flops.get_total_flops()
    assert cost(spec, 64, 4, GRID).activations == written.total


@pytest.mark.parametrize("skeleton", [
    Skeleton(4, 64, (2,), (4,), class_token=False, pos_embed="learn"), Skeleton(4, 32, (1, 2), (2, 4)),
], ids=["plain", "hierarchical"])  # fmt: skip
@pytest.mark.parametrize("row", ROWS)
def test_multiply_adds_of_every_row_in_both_skeletons(row: str, skeleton: Skeleton) -> None:
    size = (24, 20)
    model = build(skeleton, row, row, img_size=size, in_chans=1, num_classes=3).eval()
    with counting() as (flops, _):
        model(torch.randn(1, 1, *size))
    counted = backbone_cost(skeleton, row, row, size, 1, 3)
    assert 2 * counted.macs == flops.get_total_flops()
    assert counted.params == sum(p.numel() for p in model.parameters())
