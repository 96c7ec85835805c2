"""replace_mixers: another record in every block of a trained model, and what became of each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

from timm.layers import Attention, PatchEmbed, register_notrace_module
from timm.models._input import update_model_args
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kernelbank.inventory import Grid
from kernelbank.nn.block import Block, Records, TokenGrid, narrowed, square
from kernelbank.nn.carry import Carried, M, carry
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, SpecError

PLAIN, STAGE = MixerSpec.parse("vit"), MixerSpec.parse("swin")


@dataclass(frozen=True)
class Replaced:
    """What `replace_mixers` did: the records by stage, and every tensor of every mixer; its text is a table."""

    records: tuple[MixerSpec, ...]
    lines: tuple[Carried, ...]
    others: int

    def __str__(self) -> str:
        rows = [("tensor", "verdict", "how"), *_merged(self.lines), (f"{self.others} tensors outside", "kept", "")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        table = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([*table, " | ".join(map(str, self.records))])


class AttentionMixer(Mixer):
    """A mixer in the place of timm's Attention: it takes tokens and timm's masks, and finds their grid itself."""

    token_grid: TokenGrid

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). Raises SpecError for masks that the record cannot honour."""
        return super().forward(x, self.token_grid(), narrowed(x, attn_mask, is_causal))


class MixerSwinBlock(SwinTransformerBlock):
    """timm's Swin block with a mixer as `attn`, on the whole map: nothing is rolled or partitioned outside it."""

    records: Records
    index: int
    attn: Mixer

    def _attn(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        return self.attn(x.reshape(B, H * W, C), (H, W)).reshape(B, H, W, C)

    def set_input_size(self, feat_size: Grid, window_size: Grid, always_partition: bool | None = None) -> None:
        """What timm's stages call. Raises SpecError for windows that are not square and for `always_partition`."""
        if always_partition:
            raise SpecError("always_partition=True is not legal: a window is never larger than the grid (design 1.3)")
        self.records = self.records.with_window(square(window_size))
        self.attn = carry(self.attn, self.records.mixer.at_block(self.index), (feat_size[0], feat_size[1]))[0]

    def init_non_persistent_buffers(self) -> None:
        """Nothing: the mixer has its own."""


register_notrace_module(AttentionMixer)


def replace_mixers(model: nn.Module, mixer: str) -> nn.Module:
    """Give every block of `model` the record `mixer`, in place, and return the model (as timm.layers.
    convert_sync_batchnorm does).

    `model` is a timm VisionTransformer or SwinTransformer, ours included. `mixer` is a record as text, one for all
    stages or one each separated by ``|``; cells alone (``"activation=relu,count"``) change the record that the model
    has. What carries over is carried (see `nn.carry`); ``model.replaced`` is a `Replaced`, whose text is a table of
    every tensor: kept, transformed, dropped or initialised. Kept parameters are the same objects; the others are new:
    give them to the optimiser anew.

    A ViT finds the grid of its tokens in its patch embedding. On another grid tables are resampled in every forward;
    `kernelbank.from_timm` makes a backbone that resamples them once.

    Raises SpecError, and leaves the model as it was, for another model, for attention that no record holds (named),
    and for a record that does not fit.
    """
    sites = list(_sites(model))
    stages = max(site.stage for site in sites) + 1
    texts = mixer.split("|")
    if len(texts) not in (1, stages):
        raise SpecError(f"{mixer!r} has {len(texts)} records for {stages} stages; legal: 1 or {stages}")
    texts *= 1 if len(texts) == stages else stages
    records: dict[int, MixerSpec] = {}
    changes: list[tuple[_Placed, Records, Mixer]] = []
    lines: list[Carried] = []
    for site in sites:
        spec = records.setdefault(site.stage, MixerSpec.parse(texts[site.stage], site.records.mixer))
        carried, log = carry(site.mixer, spec.at_block(site.index))
        changes.append((site, replace(site.records, mixer=spec), carried))
        lines += [replace(line, name=f"{site.name}.attn.{line.name}") for line in log]
    inside = {id(tensor) for site, *_ in changes for tensor in site.block.attn.state_dict(keep_vars=True).values()}
    others = sum(id(tensor) not in inside for tensor in model.state_dict(keep_vars=True).values())
    for site, new, carried in changes:
        site.place(new, carried)
    report = Replaced(tuple(records.values()), tuple(lines), others)
    object.__setattr__(model, "replaced", report)
    if hasattr(model, "_model_args") and isinstance(sites[0].block, Block):
        update_model_args(model, mixer=" | ".join(map(str, report.records)))
    return model


# ---- the blocks of a model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """One block of a model: its attention as a mixer with the same weights."""

    name: str
    block: Any
    stage: int
    index: int
    records: Records
    mixer: Mixer
    token_grid: TokenGrid | None = None

    def place(self, records: Records, mixer: Mixer) -> None:
        """Put `mixer` into the block."""
        if isinstance(mixer, AttentionMixer):
            assert self.token_grid is not None
            mixer.token_grid = self.token_grid
        elif isinstance(self.block, SwinTransformerBlock):
            self.block.__class__ = MixerSwinBlock  # as torch.nn.utils.parametrize does: the rest of the block stays
            self.block.attn_mask, self.block.index = None, self.index
        if not isinstance(mixer, AttentionMixer):
            self.block.records = records
        self.block.attn = mixer


def _sites(model: nn.Module) -> Iterator[_Placed]:
    if isinstance(model, VisionTransformer):
        yield from _plain_sites(model)
    elif isinstance(model, SwinTransformer):
        yield from _stage_sites(model)
    else:
        raise SpecError(f"model: a {type(model).__name__} is not legal; legal: timm's VisionTransformer or "
                        "SwinTransformer, or a KernelBank backbone")  # fmt: skip


def _plain_sites(model: VisionTransformer) -> Iterator[_Placed]:
    token_grid = None
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if isinstance(block, Block):
            yield _Placed(name, block, 0, index, block.records, block.attn)
            continue
        attention = getattr(block, "attn", None)
        if isinstance(attention, AttentionMixer):
            yield _Placed(name, block, 0, index, Records(attention.spec, None), attention, attention.token_grid)
            continue
        token_grid = token_grid or TokenGrid(cast(PatchEmbed, model.patch_embed), model.dynamic_img_size)
        mixer = _read_attention(attention, f"{name}.attn", token_grid(), model.num_prefix_tokens)
        yield _Placed(name, block, 0, index, Records(mixer.spec, None), mixer, token_grid)


def _stage_sites(model: SwinTransformer) -> Iterator[_Placed]:
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            if isinstance(block, (Block, MixerSwinBlock)):
                yield _Placed(name, block, stage, index, block.records, block.attn)
                continue
            spec = window_record(block, name, model._ref_window_sizes[stage])
            yield _Placed(name, block, stage, index, Records(spec, None), _read_windows(block, name, spec, index))


def _read_attention(attention: Any, name: str, grid: Grid, prefix: int) -> AttentionMixer:
    """timm's Attention as a mixer with its weights. Raises SpecError for what no record holds."""
    if type(attention) is not Attention:
        raise SpecError(f"{name}: {type(attention).__name__} is not legal; legal: timm's Attention")
    dim = attention.qkv.in_features
    refused = {
        "attn_head_dim": attention.attn_dim != dim, "dim_out": attention.proj.out_features != dim,
        "scale_norm": not isinstance(attention.norm, nn.Identity), "gated": attention.gate is not None,
        "norm_layer of qk_norm": not isinstance(attention.q_norm, (nn.Identity, nn.LayerNorm)),
    }  # fmt: skip
    for field, found in refused.items():
        if found:
            raise SpecError(f"{name}: {field} of timm's Attention has no place in a record")
    spec = PLAIN.override(bias=str(attention.qkv.bias is not None))
    mixer = AttentionMixer(
        spec, dim, attention.num_heads, grid, prefix=prefix, qk_norm=isinstance(attention.q_norm, nn.LayerNorm),
        attn_drop=attention.attn_drop.p, proj_drop=attention.proj_drop.p, dynamic_grid=True, device="meta",
    )  # fmt: skip
    return _take(mixer, attention)


def window_record(block: SwinTransformerBlock, name: str, reference: Grid) -> MixerSpec:
    """The record of timm's Swin block, its shift alternating. Windows that the grid cuts keep the side of the
    stage's `reference`; those that do not divide the grid are padded as timm pads them.

    Raises SpecError for windows that are not square, and for windows larger than the grid (always_partition).
    """
    grid, window = block.input_resolution, block.window_size
    if any(side > length for side, length in zip(window, grid, strict=True)):
        raise SpecError(f"{name}: always_partition=True is not legal: a window is never larger than the grid")
    cut = all(side == min(whole, length) for side, whole, length in zip(window, reference, grid, strict=True))
    side = square(reference if cut else window)
    padded = any(length > side and length % side for length in grid)
    text = f"support=window({side}, alternate{', pad=timm' if padded else ''}) bias={block.attn.qkv.bias is not None}"
    return MixerSpec.parse(text, STAGE)


def _read_windows(block: SwinTransformerBlock, name: str, spec: MixerSpec, index: int) -> Mixer:
    """timm's window attention as a mixer with its weights."""
    attention, resolved = block.attn, spec.at_block(index)
    dim = attention.qkv.in_features
    if attention.proj.in_features != dim:
        raise SpecError(f"{name}: head_dim of timm's WindowAttention has no place in a record")
    mixer = Mixer(
        resolved, dim, attention.num_heads, tuple(block.input_resolution), attn_drop=attention.attn_drop.p,
        proj_drop=attention.proj_drop.p, dynamic_grid=True, device="meta",
    )  # fmt: skip
    return _take(mixer, attention)


def _take(mixer: M, attention: Any) -> M:
    """`mixer` with the weights of timm's `attention`; a projection without bias gets zeros."""
    like = attention.qkv.weight
    state = dict(attention.state_dict())
    state.setdefault("proj.bias", like.new_zeros(mixer.dim))
    mixer.to_empty(device=like.device)
    mixer.to(like.dtype).load_state_dict(state)
    mixer.init_non_persistent_buffers()
    for parameter in mixer.parameters():
        parameter.requires_grad_(like.requires_grad)
    return mixer.train(attention.training)


# ---- the table -------------------------------------------------------------------------------------------


def _merged(lines: tuple[Carried, ...]) -> list[tuple[str, str, str]]:
    """One row for tensors of consecutive blocks that fared alike: ``blocks.0-11.attn.q.weight``."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for line in lines:
        *head, block, tail = re.split(r"(?<=blocks\.)(\d+)", line.name, maxsplit=1)
        alike.setdefault((f"{''.join(head)}{{}}{tail}", line.verdict, line.how), []).append(int(block))
    return [(name.format(_ranges(blocks)), verdict, how) for (name, verdict, how), blocks in alike.items()]


def _ranges(numbers: list[int]) -> str:
    """``0-11``, or ``0,2,4`` for numbers that do not follow each other."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
