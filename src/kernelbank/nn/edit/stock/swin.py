"""timm's Swin Transformer. Its blocks roll and cut the map, so that a block with another mixer is one that takes the
whole map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as CosineWindowAttention
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.block import Block, square
from kernelbank.nn.edit.carry import carry
from kernelbank.nn.edit.stock.found import BlockAttention, Found, check_own, own_block
from kernelbank.nn.edit.stock.read import Read, read_attention
from kernelbank.nn.edit.stock.seats import Place
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, Window
from kernelbank.spec.inventory import Grid

STAGE, STAGE_V2 = MixerSpec.parse("swin"), MixerSpec.parse("swin_v2")


class SwinMixerBlock(nn.Module):
    """timm's SwinTransformerBlock with a mixer as `attn`. The mixer takes the whole map, so the block neither rolls nor
    partitions it. The other parts are those of the stock block, under the same names."""

    norm1: nn.Module
    attn: Mixer
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, mixer: Mixer, stage_spec: MixerSpec, index: int) -> None:
        super().__init__()
        self.stage_spec, self.index = stage_spec, index
        for name, part in block.named_children():
            self.add_module(name, mixer if name == "attn" else part)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        return self.run(x.reshape(B, H * W, C), (H, W)).reshape(B, H, W, C)

    def run(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H W, C) on `grid` -> (B, H W, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def set_input_size(self, feat_size: Grid, window_size: Grid, always_partition: bool | None = None) -> None:
        """Set the grid and the window size, as timm's stages do. Raises SpecError for windows that are not square."""
        support = self.stage_spec.support
        if isinstance(support, Window):
            self.stage_spec = replace(self.stage_spec, support=replace(support, M=square(window_size)))
        spec, grid = self.stage_spec.at_block(self.index), (feat_size[0], feat_size[1])
        if spec == self.attn.spec:
            self.attn.set_grid(grid)
        else:
            self.attn = carry(self.attn, spec, grid)[0]


class SwinV2MixerBlock(SwinMixerBlock):
    """timm's SwinTransformerV2Block with a mixer as `attn`: the norms are after the branches."""

    def run(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H W, C) on `grid` -> (B, H W, C)."""
        x = x + self.drop_path1(self.norm1(self.attn(x, grid)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def swin(model: Any) -> Found:
    """SwinTransformer: shifted windows with relative tables."""
    kinds = {SwinTransformerBlock: WindowAttention}
    yield from _in_stages(model, kinds, STAGE, lambda attention: attention._get_rel_pos_bias(), SwinMixerBlock)


def swin_v2(model: Any) -> Found:
    """SwinTransformerV2: cosines times a learned scale, and a bias that an MLP computes from the offsets, which becomes
    a table. The mask of timm is -100, not minus infinity."""
    kinds = {SwinTransformerV2Block: CosineWindowAttention}
    yield from _in_stages(model, kinds, STAGE_V2, _continuous_bias, SwinV2MixerBlock)


def _continuous_bias(attention: Any) -> Tensor:
    """The bias (h, T, T) of Swin V2: 16 sigmoid(MLP(offset in logarithms))."""
    entries = 16 * attention.cpb_mlp(attention.relative_coords_table).flatten(0, -2).sigmoid()
    return entries[attention.relative_position_index].permute(2, 0, 1)


def _in_stages(
    model: Any, kinds: Mapping[type[nn.Module], type[nn.Module]], base: MixerSpec, bias: Callable[[Any], Tensor],
    replaced: type[SwinMixerBlock],
) -> Found:  # fmt: skip
    """The attention of every block; `kinds` are the blocks' class and the attention's."""
    check_own([block.attn for layer in model.layers for block in layer.blocks])
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            if isinstance(block, Block):
                yield own_block(block, name, stage, index)
            elif isinstance(block, SwinMixerBlock):
                place = _placer(layer, block, index, replaced)
                yield BlockAttention(f"{name}.attn", stage, index, block.stage_spec, block.attn, place)
            else:
                _check_classes(block, name, kinds)
                reference = getattr(model, "_ref_window_sizes", {stage: block.window_size})[stage]
                spec = window_spec(block, name, index, reference, base)
                found = _read(block, name, spec, index, bias(block.attn))
                place = _placer(layer, block, index, replaced)
                yield BlockAttention(f"{name}.attn", stage, index, spec, found.mixer, place, found.lacking)


def _placer(layer: Any, block: nn.Module, index: int, replaced: type[SwinMixerBlock]) -> Place:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        layer.blocks[index] = replaced(block, mixer, stage_spec, index)

    return place


# ---- reading ---------------------------------------------------------------------------------------------


def _check_classes(block: Any, name: str, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    if kinds.get(type(block)) is not type(block.attn):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name}: invalid class {type(block).__name__}; expected timm's {expected}")


def window_spec(block: Any, name: str, index: int, reference: Grid, base: MixerSpec) -> MixerSpec:
    """Return the spec of timm's Swin block, with an alternating shift. Windows that the grid cuts keep the side of the
    stage's `reference`. The padding is ``timm`` where windows do not divide the grid, or the grid changes with the
    image.

    Raises:
        InputError: For windows larger than the grid (always_partition), or a shift that is not Swin's.
        SpecError: For windows that are not square.
    """
    grid, window = block.input_resolution, block.window_size
    if any(side > length for side, length in zip(window, grid, strict=True)):
        raise InputError(f"invalid always_partition=True in {name}: windows of {tuple(window)} exceed the grid "
                         f"{tuple(grid)}; expected False")  # fmt: skip
    expected = _shift(grid, window, index)
    if tuple(block.shift_size) != expected:
        raise InputError(f"{name}: invalid shift_size={tuple(block.shift_size)}; expected {expected}")
    cut = all(side == min(whole, length) for side, whole, length in zip(window, reference, grid, strict=True))
    side = square(reference if cut else window)
    padded = block.dynamic_mask or any(length > side and length % side for length in grid)
    biased = block.attn.qkv.bias is not None or getattr(block.attn, "q_bias", None) is not None
    return MixerSpec.parse(f"support=window({side}, alternate{', pad=timm' if padded else ''}) bias={biased}", base)


def _read(block: Any, name: str, spec: MixerSpec, index: int, bias: Tensor) -> Read:
    """Return timm's window attention as a mixer with its weights."""
    attention = block.attn
    if attention.proj.in_features != attention.qkv.in_features:
        raise InputError(f"invalid head_dim in {name}, which has no place in a spec; expected dim // num_heads")
    return read_attention(Mixer, attention, f"{name}.attn", spec, tuple(block.input_resolution),
                          bias=bias, block=index, parts=(nn.Sequential,))  # fmt: skip


def _shift(grid: Grid, window: Grid, index: int) -> Grid:
    """The shift of block `index` in Swin: half a window in odd blocks, 0 along an axis that one window fills."""
    down, along = (side // 2 * (index % 2) if length > side else 0 for length, side in zip(grid, window, strict=True))
    return down, along
