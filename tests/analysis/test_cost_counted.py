"""The closed form against what torch counts when the mixer runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernelbank import Mixer, MixerSpec
from kernelbank.analysis.cost import cost
from kernelbank.atlas import ROWS
from kernelbank.spec import Box, Pool, Static, TwoStep

# Where the default path runs matrix products and convolutions only. A gate and a kernel per position are elementwise
# products, which the counter does not see.
COUNTED = [
    row
    for row in ROWS
    if isinstance((spec := MixerSpec.parse(row)).kernel, TwoStep)
    or isinstance(spec.bank, (Static, Box))
    or (isinstance(spec.mix, Pool) and spec.size > 1)
]


@pytest.mark.parametrize("row", COUNTED)
def test_multiply_adds_are_half_the_counted_operations(row: str) -> None:
    spec, grid = MixerSpec.parse(row).at_block(0), (6, 5)  # one window, so the mask hides nothing
    mixer = Mixer(spec, 64, 4, grid).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(1, 30, 64))
    assert 2 * cost(spec, 64, 4, grid).macs == counter.get_total_flops()
