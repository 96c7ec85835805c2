"""Specs against the attention modules of timm that publish them: outputs and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import Tensor, nn

from kernelbank import Mixer


def randomise(module: nn.Module) -> None:
    """Fill every parameter with random numbers, so that no table or norm stays at its initial value."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 2)


def check(ours: Mixer, theirs: nn.Module, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """Compare outputs, gradients of the input, and gradients of every parameter of the same name."""
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    gradients = [torch.autograd.grad(o, x, upstream.view_as(o), retain_graph=True)[0] for o in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    (y * upstream).sum().backward()
    (expected * upstream.view_as(expected)).sum().backward()
    for name, weight in (("out.weight", "proj.weight"), ("out.bias", "proj.bias")):
        mine, published = ours.get_parameter(name).grad, theirs.get_parameter(weight).grad
        assert mine is not None and published is not None
        torch.testing.assert_close(mine, published, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("text", "partition"), [("maxvit_grid support=grid(4)", "grid"),
                                                 ("swin support=window(4)", "block")])  # fmt: skip
@pytest.mark.parametrize("grid", [(8, 12), (4, 8), (4, 4)])
def test_partitions_of_maxvit(text: str, partition: str, grid: tuple[int, int]) -> None:
    cfg = MaxxVitTransformerCfg(dim_head=8, head_first=False, window_size=(4, 4), grid_size=(4, 4))
    theirs = PartitionAttentionCl(16, partition, cfg, dtype=torch.float64)
    randomise(theirs)
    attn = theirs.attn
    ours = Mixer(text, 16, 2, grid, dtype=torch.float64)
    ours.load_state_dict({name.removeprefix("rel_pos."): t for name, t in attn.state_dict().items()
                          if not name.endswith("index")})  # fmt: skip
    x = torch.randn(2, *grid, 16, dtype=torch.float64, requires_grad=True)
    check(ours, attn, x, ours(x.flatten(1, 2)).view_as(x), theirs._partition_attn(x))
