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
from kernelbank.analysis.cost import cost, model_cost
from kernelbank.atlas import ROWS
from kernelbank.model import ModelSpec, SwinTrunk, Trunk, ViTTrunk
from kernelbank.nn.build import build
from kernelbank.spec import Static
from kernelbank.spec.inventory import inventory

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}


class Written(TorchDispatchMode):
    """Counts the elements that matrix products and convolutions write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.total += result.numel()
        return result


GRID = (6, 5)  # one window, so that no mask hides what the definition does not count


@contextmanager
def counting(row: str) -> Iterator[tuple[FlopCounterMode, Written]]:
    """On the path that applies every kernel by a convolution; static kernels that are linear layers are called."""
    static = {tensor.name: tensor for tensor in inventory(MixerSpec.parse(row), 64, 4, GRID)}.get("key.weight")
    called = isinstance(MixerSpec.parse(row).bank, Static) and static is not None and len(static.shape) == 2
    with use_path("bottleneck" if called else "conv", "linear"), FlopCounterMode(display=False) as flops:
        with Written() as written, torch.no_grad():
            yield flops, written


@pytest.mark.parametrize("row", ROWS)
def test_multiply_adds_and_activations_of_every_row_are_those_counted(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(0)
    mixer = Mixer(spec, 64, 4, GRID).eval()
    with counting(row) as (flops, written):
        mixer(torch.randn(1, 30, 64))
    assert 2 * cost(spec, 64, 4, GRID).macs == flops.get_total_flops()
    assert cost(spec, 64, 4, GRID).activations == written.total


TRUNKS = {
    "plain": ViTTrunk(patch_size=(4, 4), embed_dim=64, depth=2, num_heads=4, class_token=False, global_pool="avg"),
    "hierarchical": SwinTrunk(embed_dim=32, depths=(1, 2), num_heads=(2, 4)),
}


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
@pytest.mark.parametrize("row", ROWS)
def test_multiply_adds_of_every_row_in_every_trunk(row: str, trunk: Trunk) -> None:
    spec = ModelSpec(trunk=trunk, mixer=row, mlp=row, img_size=(24, 20), in_chans=1, num_classes=3)
    model = build(spec).eval()
    with counting(row) as (flops, _):
        model(torch.randn(1, 1, 24, 20))
    assert 2 * model_cost(spec).macs == flops.get_total_flops()
    assert model_cost(spec).params == sum(p.numel() for p in model.parameters())
