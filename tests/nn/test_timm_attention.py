"""Specs against the attention modules of timm that publish them: outputs and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, build_rotary_pos_embed
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from torch import Tensor, nn

from kernelbank import Mixer, MixerSpec
from kernelbank.ops.rotation import turns


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


Grid = tuple[int, int]
EVA = ("rope(10000)", "rope(100, axes=xy)", "rope(10000, side=16)", "rope(10000, axes=xy, origin=1, side=24)")
DINOV3 = ("rope(100, half, unit)", "rope(50, coordinates=unit, axes=xy)")


def embedding(position: str, grid: Grid, width: int) -> Tensor:
    """timm's sines and cosines in float64: its functions, from frequencies that are not rounded to float32."""
    rope = MixerSpec.parse(f"vit position={position}").position
    indexing = "xy" if rope.axes == "xy" else "ij"
    powers = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    if rope.coordinates == "index":
        reference = None if rope.side == "grid" else [rope.side] * 2
        return torch.cat(build_rotary_pos_embed(
            list(grid), rope.theta**-powers, in_pixels=False, ref_feat_shape=reference, grid_offset=rope.origin,
            grid_indexing=indexing, rotate_half=rope.layout == "half", dtype=torch.float64,
        ), -1)  # fmt: skip
    theirs = RotaryEmbeddingDinoV3(width, rope.theta, rotate_half=rope.layout == "half", grid_indexing=indexing,
                                   dtype=torch.float64)  # fmt: skip
    theirs.periods = rope.theta**powers
    return theirs.get_embed(list(grid))


UNROUNDED = [(4, 8), (2, 4), (4, 4)]
"""Grids on which the float32 coordinates of timm are exact: every scaled coordinate is a small binary fraction."""


@pytest.mark.parametrize(
    ("position", "grid"),
    [*((position, grid) for position in (*EVA, *DINOV3) for grid in UNROUNDED), *((p, (3, 5)) for p in EVA[:2])],
)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rope_of_eva_and_dinov3(position: str, grid: Grid, prefix: int) -> None:
    half = "half" in position
    theirs = AttentionRope(32, 2, num_prefix_tokens=prefix, rotate_half=half, dtype=torch.float64)
    randomise(theirs)
    ours = Mixer(f"vit position={position}", 32, 2, grid, prefix=prefix, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, prefix + grid[0] * grid[1], 32, dtype=torch.float64, requires_grad=True)
    check(ours, theirs, x, ours(x), theirs(x, rope=embedding(position, grid, 16)))


@pytest.mark.parametrize(
    ("position", "theirs"),
    [("rope(100, axes=xy)", RotaryEmbeddingCat(32, temperature=100.0, in_pixels=False, feat_shape=[14, 14],
                                               grid_indexing="xy")),
     ("rope(10000, side=16)", RotaryEmbeddingCat(32, in_pixels=False, feat_shape=[14, 14], ref_feat_shape=[16, 16])),
     ("rope(100, half, unit)", RotaryEmbeddingDinoV3(32, 100.0, feat_shape=[14, 14]))],
)  # fmt: skip
def test_the_embeddings_of_published_models(position: str, theirs: nn.Module) -> None:
    """timm's modules as its models build them, in float32."""
    rope = MixerSpec.parse(f"vit position={position}").position
    cos, sin = turns(rope, (14, 14), 0, 32, torch.float32, None)
    torch.testing.assert_close(torch.cat([sin, cos], -1), theirs.get_embed(), rtol=1e-4, atol=1e-4)
