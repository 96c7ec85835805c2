"""Attention in windows and grids of maps that a block of timm's cuts: MaxViT, TinyViT, DaViT, Twins.

In MaxViT, TinyViT and DaViT the block itself cuts the map, so that the block is replaced by one whose mixer takes the
whole map, and whose other parts are those of the stock block, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.edit.stock.found import BlockAttention, Found, LeftAttention
from kernelbank.nn.edit.stock.grids import of_channels_last, of_map, shapes
from kernelbank.nn.edit.stock.maps import coatnet
from kernelbank.nn.edit.stock.read import RELATIVE, Read, read_attention, relative_bias
from kernelbank.nn.edit.stock.seats import Inputs, SeatedMixer, placer
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, Window
from kernelbank.spec.inventory import Grid

PLAIN = MixerSpec.parse("vit")


class WholeMapMixer(SeatedMixer):
    """A mixer in a block that cuts no windows itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, C) -> (B, H, W, C)."""
        tokens, grid, mask = self.inputs(x)
        return Mixer.forward(self, tokens, grid, mask).unflatten(1, grid)

    def inputs(self, x: Tensor) -> Inputs:
        return x.flatten(1, 2), (x.shape[1], x.shape[2]), None


class PaddedMixer(WholeMapMixer):
    """A mixer in a block that fills its windows with zeros, which take part in the attention."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, C) -> (B, H, W, C)."""
        return super().forward(filled(x, self.spec))[:, : x.shape[1], : x.shape[2]]

    def inputs(self, x: Tensor) -> Inputs:
        return super().inputs(filled(x, self.spec))


class SizedMixer(PaddedMixer):
    """A mixer in the place of Twins' attention in windows, which takes tokens and their grid."""

    def forward(self, x: Tensor, size: Grid) -> Tensor:  # type: ignore[override]
        """x (B, H W, C) on the grid `size` -> (B, H W, C)."""
        return super().forward(x.unflatten(1, (size[0], size[1]))).flatten(1, 2)

    def inputs(self, x: Tensor, size: Grid | None = None) -> Inputs:
        return super().inputs(x if size is None else x.unflatten(1, (size[0], size[1])))


def filled(x_BHWC: Tensor, spec: MixerSpec) -> Tensor:
    """The map with zeros below and to the right, until the windows of `spec` divide it."""
    if not isinstance(spec.support, Window):
        return x_BHWC
    down, along = (-length % spec.support.M for length in x_BHWC.shape[1:3])
    return F.pad(x_BHWC, (0, 0, 0, along, 0, down))


class MixerBlock(nn.Module):
    """A block of timm's with a mixer as `attn` that takes the whole map."""

    attn: SeatedMixer

    def __init__(self, block: nn.Module, mixer: SeatedMixer) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, mixer if name == "attn" else part)
        self.training = block.training


class PartitionMixerBlock(MixerBlock):
    """MaxViT's PartitionAttentionCl."""

    norm1: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TinyMixerBlock(MixerBlock):
    """TinyVitBlock. The norm inside its attention is `attn_norm`."""

    attn_norm: nn.Module
    drop_path1: nn.Module
    local_conv: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Any, mixer: SeatedMixer) -> None:
        super().__init__(block, mixer)
        if not isinstance(block, TinyMixerBlock):
            self.add_module("attn_norm", block.attn.norm)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        y = self.attn(self.attn_norm(filled(x, self.attn.spec)))  # padded before the norm, as in TinyVitBlock
        x = x + self.drop_path1(y[:, :height, :width])
        x = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return (x + self.drop_path2(self.mlp(x))).unflatten(1, (height, width))


class SpatialMixerBlock(MixerBlock):
    """DaViT's SpatialBlock."""

    cpe1: nn.Module
    norm1: nn.Module
    drop_path1: nn.Module
    cpe2: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)
        y = self.attn(self.norm1(shortcut).unflatten(1, (height, width))).flatten(1, 2)
        x = self.cpe2((shortcut + self.drop_path1(y)).transpose(1, 2).unflatten(2, (height, width)))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).unflatten(2, (height, width))


for leaf in (WholeMapMixer, PaddedMixer, SizedMixer, TinyMixerBlock):
    register_notrace_module(leaf)


def maxvit(model: Any) -> Found:
    """MaxxVit: windows and dilated grids in turn (MaxViT, arXiv 2204.01697), or attention on whole maps (CoAtNet). The
    windows of a stage of MaxViT are a stage of mixers, and its grids another."""
    cut, whole = list[tuple[str, int, int, nn.Module, str]](), list[tuple[str, int, int, Any]]()
    for number, stage in enumerate(model.stages):
        for index, block in enumerate(stage.blocks):
            name = f"stages.{number}.blocks.{index}"
            if type(block).__name__ == "TransformerBlock2d":
                whole.append((name, number, index, block))
            for leaf in ("attn_block", "attn_grid"):
                if isinstance(getattr(block, leaf, None), nn.Module):
                    cut.append((f"{name}.{leaf}", number, index, block, leaf))
            if type(block).__name__ == "ParallelMaxxVitBlock":
                raise InputError(f"{name}: invalid parallel attention, whose windows and grids share a norm; expected "
                                 "one after the other")  # fmt: skip
    yield from coatnet(model, whole)
    grids = shapes(model, [name for name, *_ in cut])
    for name, number, index, owner, leaf in cut:
        stage = 2 * number + (leaf == "attn_grid")
        yield _partition(owner, leaf, name, stage, index, of_channels_last(grids[name].input))


def _partition(owner: Any, leaf: str, name: str, stage: int, index: int, grid: Grid) -> BlockAttention:
    block = getattr(owner, leaf)

    def read() -> Read:
        side, other = block.partition_size
        if side != other:
            raise InputError(f"invalid partition_size={block.partition_size} of {name}; expected a square")
        support = f"window({side})" if block.partition_block else f"grid({side})"
        bias = relative_bias(block.attn.rel_pos, f"{name}.attn")
        spec = PLAIN.override(support=support, position="none" if bias is None else "relative")
        return read_attention(WholeMapMixer, block.attn, f"{name}.attn", spec, grid, bias=bias, parts=RELATIVE,
                              head_first=block.attn.head_first)  # fmt: skip

    return _in_block(owner, leaf, name, stage, index, read, PartitionMixerBlock)


def tiny_vit(model: Any) -> Found:
    """TinyViT: windows with a bias for the absolute offset (arXiv 2207.10666), which becomes a table over offsets."""
    blocks = _blocks(model, ("TinyVitBlock", "TinyMixerBlock"))
    grids = shapes(model, [name for name, *_ in blocks])
    for name, stage, index, owner, leaf in blocks:
        block = getattr(owner, leaf)
        grid = of_channels_last(grids[name].input)
        read = partial(_tiny, block, f"{name}.attn", grid)
        yield _in_block(owner, leaf, name, stage, index, read, TinyMixerBlock)


def _tiny(block: Any, name: str, grid: Grid) -> Read:
    side, attention = block.window_size, block.attn
    spec = PLAIN.override(support=f"window({side})", position="relative")
    bias = attention.attention_biases[:, attention.attention_bias_idxs]
    padded = grid[0] + -grid[0] % side, grid[1] + -grid[1] % side
    return read_attention(WholeMapMixer, attention, name, spec, padded, bias=bias, head_first=True, inner_norm=True)


def davit(model: Any) -> Found:
    """DaViT: attention in windows (arXiv 2204.03645). The attention between channels stays."""
    blocks = _blocks(model, ("SpatialBlock", "SpatialMixerBlock"))
    grids = shapes(model, [name for name, *_ in blocks])
    for name, stage, index, owner, leaf in blocks:
        block = getattr(owner, leaf)
        read = partial(_windows, PaddedMixer, block, f"{name}.attn", of_map(grids[name].input))
        yield _in_block(owner, leaf, name, stage, index, read, SpatialMixerBlock)
    for name, module in model.named_modules():
        if type(module).__name__ in ("ChannelAttention", "ChannelAttentionV2"):
            yield LeftAttention(name, "attends between channels")


def _windows(kind: Any, block: Any, name: str, grid: Grid) -> Read:
    """The attention of DaViT's blocks and Twins' in windows."""
    side = block.window_size[0] if hasattr(block, "window_size") else block.attn.ws
    return read_attention(kind, block.attn, name, PLAIN.override(support=f"window({side})"), grid)


def twins(model: Any) -> Found:
    """Twins: attention in windows (arXiv 2104.13840). Attention to a map that a conv has made smaller stays."""
    blocks = [(f"blocks.{stage}.{index}", stage, index, block)
              for stage, part in enumerate(model.blocks) for index, block in enumerate(part)]  # fmt: skip
    for name, stage, index, block in blocks:
        attention, where, place = block.attn, f"{name}.attn", placer(block, "attn")
        if isinstance(attention, SeatedMixer):
            yield BlockAttention(where, stage, index, attention.stage_spec, attention, place)
        elif type(attention).__name__ == "LocallyGroupedAttn":
            embed = model.patch_embeds[stage]
            found = _windows(SizedMixer, block, where, (embed.H, embed.W))
            yield BlockAttention(where, stage, index, found.mixer.spec, found.mixer, place, found.lacking)
        else:
            yield LeftAttention(where, "attends to a smaller map, of a conv with a stride")


# ---- what they share -------------------------------------------------------------------------------------


def _blocks(model: nn.Module, kinds: tuple[str, ...]) -> list[tuple[str, int, int, nn.Module, str]]:
    """Name, stage, index, owner and leaf of every block of the given classes; stages are numbered as they come."""
    found = list[tuple[str, int, int, nn.Module, str]]()
    counts: dict[str, int] = {}
    stages: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in kinds:
            home, _, leaf = name.rpartition(".")
            stage = ".".join(name.split(".")[:2])
            index = counts[stage] = counts.get(stage, -1) + 1
            found.append((name, stages.setdefault(stage, len(stages)), index, model.get_submodule(home), leaf))
    return found


def _in_block(
    owner: Any, leaf: str, name: str, stage: int, index: int, read: Callable[[], Read], kind: type[MixerBlock]
) -> BlockAttention:
    """The attention of the block `leaf` of `owner`, which a block of `kind` replaces together with the attention."""
    block = getattr(owner, leaf)

    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        assert isinstance(mixer, WholeMapMixer)
        mixer.stage_spec = stage_spec
        setattr(owner, leaf, kind(block, mixer))

    if isinstance(block, kind):
        mixer = block.attn
        return BlockAttention(f"{name}.attn", stage, index, mixer.stage_spec, mixer, place)
    found = read()
    return BlockAttention(f"{name}.attn", stage, index, found.mixer.spec, found.mixer, place, found.lacking)
