"""The closed form against what torch counts when the mixer runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernelbank import Mixer, MixerSpec, use_path
from kernelbank.analysis.cost import cost
from kernelbank.atlas import ROWS
from kernelbank.spec import Box, Pool, Static, TwoStep

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}

# Where the vectorised path runs matrix products and convolutions only. A gate and a kernel per position are
# elementwise products, which the counter does not see.
COUNTED = [
    row
    for row in ROWS
    if isinstance((spec := MixerSpec.parse(row)).kernel, TwoStep)
    or isinstance(spec.bank, (Static, Box))
    or (isinstance(spec.mix, Pool) and spec.size > 1)
]


class Written(TorchDispatchMode):
    """Counts the numbers that matrix products and convolutions write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.total += result.numel()
        return result


@pytest.mark.parametrize("row", COUNTED)
def test_multiply_adds_and_activations_are_those_counted(row: str) -> None:
    spec, grid = MixerSpec.parse(row).at_block(0), (6, 5)  # one window, so the mask hides nothing
    mixer = Mixer(spec, 64, 4, grid).eval()
    with use_path("vectorised"), FlopCounterMode(display=False) as counter, Written() as written, torch.no_grad():
        mixer(torch.randn(1, 30, 64))
    assert 2 * cost(spec, 64, 4, grid).macs == counter.get_total_flops()
    assert cost(spec, 64, 4, grid).activations == written.total
