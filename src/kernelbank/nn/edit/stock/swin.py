"""timm's Swin Transformer. Its blocks roll and cut the map, so that a block with another mixer is one that takes the
whole map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.block import Block, square
from kernelbank.nn.edit.carry import carry
from kernelbank.nn.edit.stock.found import BlockAttention, Found, check_own, own_block
from kernelbank.nn.edit.stock.read import Read, read_attention
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, Window
from kernelbank.spec.inventory import Grid

STAGE = MixerSpec.parse("swin")


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
        x = x.reshape(B, H * W, C)
        x = x + self.drop_path1(self.attn(self.norm1(x), (H, W)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(B, H, W, C)

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


def swin(model: Any) -> Found:
    """SwinTransformer: shifted windows with relative tables."""
    check_own([block.attn for layer in model.layers for block in layer.blocks])
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            if isinstance(block, Block):
                yield own_block(block, name, stage, index)
            elif isinstance(block, SwinMixerBlock):
                place = _placer(layer, block, index)
                yield BlockAttention(f"{name}.attn", stage, index, block.stage_spec, block.attn, place)
            else:
                spec = window_spec(block, name, index, model._ref_window_sizes[stage])
                found = _read(block, name, spec, index)
                place = _placer(layer, block, index)
                yield BlockAttention(f"{name}.attn", stage, index, spec, found.mixer, place, found.lacking)


def _placer(layer: Any, block: nn.Module, index: int) -> Callable[[MixerSpec, Mixer], None]:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        layer.blocks[index] = SwinMixerBlock(block, mixer, stage_spec, index)

    return place


# ---- reading ---------------------------------------------------------------------------------------------


def window_spec(block: Any, name: str, index: int, reference: Grid) -> MixerSpec:
    """Return the spec of timm's Swin block, with an alternating shift. Windows that the grid cuts keep the side of the
    stage's `reference`. The padding is ``timm`` where windows do not divide the grid, or the grid changes with the
    image.

    Raises:
        InputError: For another block or attention, windows larger than the grid (always_partition), or a shift that is
            not Swin's.
        SpecError: For windows that are not square.
    """
    if type(block) is not SwinTransformerBlock or type(block.attn) is not WindowAttention:
        raise InputError(f"{name}: invalid class {type(block).__name__}; expected timm's SwinTransformerBlock")
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
    text = f"support=window({side}, alternate{', pad=timm' if padded else ''}) bias={block.attn.qkv.bias is not None}"
    return MixerSpec.parse(text, STAGE)


def _read(block: Any, name: str, spec: MixerSpec, index: int) -> Read:
    """Return timm's window attention as a mixer with its weights."""
    attention = block.attn
    if attention.proj.in_features != attention.qkv.in_features:
        raise InputError(f"invalid head_dim in {name}, which has no place in a spec; expected dim // num_heads")
    return read_attention(Mixer, attention, f"{name}.attn", spec, tuple(block.input_resolution),
                          bias=attention._get_rel_pos_bias(), block=index)  # fmt: skip


def _shift(grid: Grid, window: Grid, index: int) -> Grid:
    """The shift of block `index` in Swin: half a window in odd blocks, 0 along an axis that one window fills."""
    down, along = (side // 2 * (index % 2) if length > side else 0 for length, side in zip(grid, window, strict=True))
    return down, along
