"""Token mixers of timm on maps: CoAtNet's attention, CAFormer's, PoolFormer's pooling, ConvNeXt's depth-wise convs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.edit.stock.found import BlockAttention, Found, LeftAttention
from kernelbank.nn.edit.stock.grids import of_map, shapes
from kernelbank.nn.edit.stock.read import RELATIVE, assigned, check_parts, kernel, read_attention, relative_bias
from kernelbank.nn.edit.stock.seats import AttentionMixer, MapMixer, SeatedMixer, adopting_placer, placer, token_placer
from kernelbank.nn.edit.stock.tokens import PLAIN
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid

POOL, CONV = MixerSpec.parse("pool"), MixerSpec.parse("dwconv")
HEAD_WIDTH = 32
"""The least width of the heads that an attention has in the place of a module without heads."""


def coatnet(model: Any, blocks: Sequence[tuple[str, int, int, Any]]) -> Found:
    """The attention blocks of a MaxxVit on whole maps (CoAtNet, arXiv 2106.04803)."""
    grids = shapes(model, [f"{name}.attn" for name, *_ in blocks])
    for name, stage, index, block in blocks:
        attention, where = block.attn, f"{name}.attn"
        place = placer(block, "attn")
        if isinstance(attention, SeatedMixer):
            yield BlockAttention(where, stage, index, attention.stage_spec, attention, place)
            continue
        if attention.qkv.in_channels != attention.proj.out_channels:
            yield LeftAttention(where, "changes the number of channels")
            continue
        bias = relative_bias(attention.rel_pos, where)
        spec = PLAIN if bias is None else PLAIN.override(position="relative")
        found = read_attention(
            MapMixer, attention, where, spec, of_map(grids[where].input), bias=bias, head_first=attention.head_first,
            parts=(nn.Conv2d, *RELATIVE),
        )  # fmt: skip
        yield BlockAttention(where, stage, index, found.mixer.spec, found.mixer, place, found.lacking)


def metaformer(model: Any) -> Found:
    """MetaFormer: attention on tokens (CAFormer) or pooling on maps (PoolFormer). Separable convs stay."""
    grids = shapes(model, [f"stages.{stage}.downsample" for stage in range(len(model.stages))])
    for number, stage in enumerate(model.stages):
        grid = of_map(grids[f"stages.{number}.downsample"].output)
        token_grid = cache(partial(MapGrid, stage.downsample, grid))
        for index, block in enumerate(stage.blocks):
            yield _in_metaformer(block, f"stages.{number}.blocks.{index}.token_mixer", number, index, grid, token_grid)


def _in_metaformer(
    block: Any, name: str, stage: int, index: int, grid: Grid, token_grid: Callable[[], Callable[[int], Grid]]
) -> BlockAttention | LeftAttention:
    mixer = block.token_mixer
    match type(mixer).__name__:
        case _ if isinstance(mixer, AttentionMixer):
            place = token_placer(block, "token_mixer", partial(getattr, mixer, "token_grid"))
            return BlockAttention(name, stage, index, mixer.stage_spec, mixer, place)
        case _ if isinstance(mixer, SeatedMixer):
            return BlockAttention(name, stage, index, mixer.stage_spec, mixer, placer(block, "token_mixer"))
        case "Attention":
            found = read_attention(AttentionMixer, mixer, name, PLAIN, grid)
            place = token_placer(block, "token_mixer", token_grid)
            return BlockAttention(name, stage, index, found.mixer.spec, found.mixer, place, found.lacking)
        case "Pooling":
            check_parts(mixer, name, (nn.AvgPool2d,))
            if type(mixer.pool) is not nn.AvgPool2d:
                raise InputError(f"invalid {name}.pool, a {type(mixer.pool).__name__}; expected nn.AvgPool2d")
            spec, dim = POOL.override(size=str(mixer.pool.kernel_size)), block.mlp.fc1.in_channels
            pool = MapMixer(spec, dim, heads_of(dim), grid, dynamic_grid=True).train(mixer.training)
            return BlockAttention(name, stage, index, spec, pool, adopting_placer(block, "token_mixer"))
        case kind:
            return LeftAttention(name, f"{kind} mixes more channels than it takes")


def attention_on_maps(model: Any, leaf: str) -> Found:
    """The attention, under the name `leaf`, of every block of FastViT and Visformer that has one; maps (B, C, H, W)."""
    stages: dict[str, int] = {}
    owners = [(name, part) for name, part in model.named_modules() if _has_attention(part, leaf)]
    grids = shapes(model, [f"{name}.{leaf}" for name, _ in owners])
    for index, (name, owner) in enumerate(owners):
        attention, where, place = getattr(owner, leaf), f"{name}.{leaf}", placer(owner, leaf)
        stage = stages.setdefault(name.rpartition(".")[0], len(stages))
        if isinstance(attention, SeatedMixer):
            yield BlockAttention(where, stage, index, attention.stage_spec, attention, place)
        else:
            grid = of_map(grids[where].input)
            found = read_attention(MapMixer, attention, where, PLAIN, grid, parts=(nn.Conv2d,))
            yield BlockAttention(where, stage, index, found.mixer.spec, found.mixer, place, found.lacking)


def _has_attention(part: nn.Module, leaf: str) -> bool:
    inside = getattr(part, leaf, None)
    return isinstance(inside, SeatedMixer) or type(inside).__name__ == "Attention"


def convnext(model: Any) -> Found:
    """ConvNeXt: the depth-wise conv of every block, a static bank of one kernel. One with a stride or a dilation
    stays."""
    blocks = {
        f"stages.{stage}.blocks.{index}.conv_dw": (stage, index, block)
        for stage, part in enumerate(model.stages) for index, block in enumerate(part.blocks)
    }  # fmt: skip
    grids = shapes(model, blocks)
    for name, (stage, index, block) in blocks.items():
        conv, place = block.conv_dw, placer(block, "conv_dw")
        if isinstance(conv, SeatedMixer):
            yield BlockAttention(name, stage, index, conv.stage_spec, conv, place)
        elif reason := _no_kernel(conv):
            yield LeftAttention(name, reason)
        else:
            check_parts(conv, name, (nn.Conv2d,))
            spec = CONV.override(size=str(conv.kernel_size[0]), bias=str(conv.bias is not None))
            dim = conv.in_channels
            mixer = MapMixer(spec, dim, heads_of(dim), of_map(grids[name].input), dynamic_grid=True, device="meta")
            mixer = assigned(mixer, kernel(conv, mixer.entries), conv)
            yield BlockAttention(name, stage, index, spec, mixer, place)


def _no_kernel(conv: Any) -> str:
    """Why `conv` is no depth-wise convolution of the operator; empty if it is one."""
    size = conv.kernel_size[0]
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, with padding of its own"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"has stride {conv.stride[0]} and dilation {conv.dilation[0]}"
    if conv.kernel_size != (size, size) or conv.padding != (size // 2, size // 2) or size % 2 == 0:
        return f"has kernels of {tuple(conv.kernel_size)} and padding {conv.padding}"
    if not conv.in_channels == conv.out_channels == conv.groups or conv.padding_mode != "zeros":
        return "is not depth-wise, or pads with other values than zeros"
    return ""


def heads_of(dim: int) -> int:
    """The number of heads of a mixer in the place of a module without: as many as are at least `HEAD_WIDTH` wide."""
    return next(heads for heads in range(max(1, dim // HEAD_WIDTH), 0, -1) if dim % heads == 0)


class MapGrid:
    """The grid of N tokens that a module's last map (B, C, H, W) of N positions had; before one, `grid`.

    A backward that runs blocks again uses the last one.
    """

    def __init__(self, module: nn.Module, grid: Grid) -> None:
        self.grid, self.seen = grid, dict[int, Grid]()
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = output.shape[-2:]
        self.seen[height * width] = height, width

    def __call__(self, count: int) -> Grid:
        """Return (H, W) of `count` tokens."""
        return self.seen.get(count, self.grid)
