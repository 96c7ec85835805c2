"""replace_mixers: another spec in every block of a trained model, and what became of each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from kernelbank.errors import InputError
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone, remember, table_names, window_sides
from kernelbank.nn.edit.carry import Carried, carry
from kernelbank.nn.edit.stock import BlockAttention, block_attentions
from kernelbank.spec import MixerSpec, SpecError, read_stages
from kernelbank.text import columns


@dataclass(frozen=True)
class Replaced:
    """What `replace_mixers` did: the `specs` by stage, and every tensor of every mixer; `others` counts the tensors
    outside, which stay. Its text is a table."""

    specs: tuple[MixerSpec, ...]
    lines: tuple[Carried, ...]
    others: int

    def __str__(self) -> str:
        rows = [("tensor", "verdict", "how"), *_merged(self.lines), (f"{self.others} tensors outside", "kept", "")]
        return "\n".join([columns(rows), " | ".join(map(str, self.specs))])


def replace_mixers(model: nn.Module, text: str) -> nn.Module:
    """Give every block of `model` the spec `text`, in place, and return the model (as timm.layers.
    convert_sync_batchnorm does).

    `model` is a timm VisionTransformer or SwinTransformer, ours included. `text` is one spec for all stages or one
    each separated by ``|``; cells alone (``"activation=relu,count"``) change the spec that the model has. What
    carries over is carried (see `nn.edit.carry`); ``model.replaced`` is a `Replaced`, whose text is a table of every
    tensor: kept, transformed, dropped or initialised. The parameters of a stock model's attention are new objects with
    the values that were kept: give them to the optimiser anew.

    A ViT finds the grid of its tokens in its patch embedding. On another grid tables are resampled in every forward;
    `kernelbank.from_timm` makes a backbone that resamples them once.

    Raises InputError for another model and for attention that no spec holds, SpecError for a spec that does not
    exist or does not fit; both leave the model as it was.
    """
    attentions = list(block_attentions(model))
    if not attentions:
        raise InputError("invalid model without blocks; expected at least one")
    bases = {attention.stage: attention.spec for attention in reversed(attentions)}
    specs = read_stages(text, len(bases), [bases[stage] for stage in sorted(bases)])
    for stage, spec in enumerate(specs):
        if (spec.frame == "bn_relu") != (bases[stage].frame == "bn_relu"):
            raise SpecError(f"invalid frame={spec.frame} in place of {bases[stage].frame}: bn_relu has BatchNorm "
                            "around it, other frames LayerNorm; expected a backbone built with the spec")  # fmt: skip
    results = [carry(old.mixer, specs[old.stage].at_block(old.index)) for old in attentions]
    names = [attention.name for attention in attentions]
    lines = _lines(attentions, [log for _, log in results])
    report = Replaced(specs, tuple(lines), _outside(model, names))
    for attention, (mixer, _) in zip(attentions, results, strict=True):
        attention.place(specs[attention.stage], mixer)
    _remember(model, specs)
    setattr(model, "replaced", report)  # noqa: B010 - the type of a module knows no such attribute
    return model


def _lines(attentions: Sequence[BlockAttention], logs: Iterable[Iterable[Carried]]) -> list[Carried]:
    """The outcome of every tensor under its name in the model. Zeros for what a model lacks are initialised."""
    return [
        replace(line, name=f"{attention.name}.attn.{line.name}", verdict="initialised", how="zeros")
        if line.name in attention.lacking and line.verdict == "kept"
        else replace(line, name=f"{attention.name}.attn.{line.name}")
        for attention, log in zip(attentions, logs, strict=True)
        for line in log
    ]


def _outside(model: nn.Module, blocks: list[str]) -> int:
    """How many tensors of the state are of no block's attention."""
    inside = tuple(f"{name}.attn." for name in blocks)
    return sum(not name.startswith(inside) for name in model.state_dict())


def _remember(model: nn.Module, specs: tuple[MixerSpec, ...]) -> None:
    """What a saved configuration and timm's resizing go on from."""
    if isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        remember(model, mixer=" | ".join(map(str, specs)), window_size=None)
    if isinstance(model, SwinTransformer):  # timm scales these with the grid
        model._ref_window_sizes = window_sides(specs, model._ref_window_sizes)
        model._ref_grid_size = tuple(model.patch_embed.grid_size)
    if not isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        setattr(model, "no_weight_decay", partial(no_weight_decay, model))  # noqa: B010 - a method of its class


def no_weight_decay(model: Any) -> set[str]:
    """What the class of a stock model leaves out of weight decay, and the relative tables (Swin's rule)."""
    return {*type(model).no_weight_decay(model), *table_names(model)}


# ---- the table -------------------------------------------------------------------------------------------


def _merged(lines: tuple[Carried, ...]) -> list[tuple[str, str, str]]:
    """One row for tensors of consecutive blocks that fared alike: ``blocks.0-11.attn.q.weight``."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for line in lines:
        head, block, tail = re.split(r"(?<=blocks\.)(\d+)", line.name, maxsplit=1)
        alike.setdefault((f"{head}{{}}{tail}", line.verdict, line.how), []).append(int(block))
    return [(name.format(_ranges(blocks)), verdict, how) for (name, verdict, how), blocks in alike.items()]


def _ranges(numbers: list[int]) -> str:
    """``0-11``, or ``0,2,4`` for numbers that do not follow each other."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
