"""`replace_mixers`: replace the mixer of every block of a trained model, and report the outcome for each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from kernelbank.errors import InputError
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone, remember, table_names, window_sides
from kernelbank.nn.edit.carry import Carried, carry
from kernelbank.nn.edit.stock import BlockAttention, block_attentions
from kernelbank.spec import MixerSpec, SpecError, read_stages
from kernelbank.text import columns


@dataclass(frozen=True)
class Replaced:
    """The outcome of `replace_mixers`: the `specs` of the stages, the outcome for every tensor of every mixer, and the
    number of `others`, the tensors outside the mixers, which stay. Its string is a table."""

    specs: tuple[MixerSpec, ...]
    lines: tuple[Carried, ...]
    others: int

    def __str__(self) -> str:
        rows = [("tensor", "verdict", "how"), *_merged(self.lines), (f"{self.others} tensors outside", "kept", "")]
        return "\n".join([columns(rows), " | ".join(map(str, self.specs))])


def replace_mixers(model: nn.Module, text: str) -> nn.Module:
    """Replace the mixer of every block of `model`, in place, and return the model, as
    timm.layers.convert_sync_batchnorm does.

    Weights carry over where they have a place in the new mixer (see `nn.edit.carry`). ``model.replaced`` is a
    `Replaced`, whose string is a table of every tensor: kept, transformed, dropped or initialised. The parameters of a
    stock model's attention are new objects: create the optimiser afterwards.

    A ViT takes the grid of its tokens from its patch embedding. On another grid, tables are resampled in every forward;
    `kernelbank.from_timm` returns a backbone that resamples them once.

    Args:
        model: A VisionTransformer or SwinTransformer of timm, or a backbone of this library. It may be compiled or in
            DataParallel: the model inside is changed, and has ``replaced``.
        text: A spec for all stages, or one per stage separated by ``|``. Cells alone (``"activation=relu,count"``)
            change the spec that the model has.

    Raises:
        InputError: For another model, or attention that no spec describes. The model is then unchanged.
        SpecError: For a spec that does not exist or does not fit. The model is then unchanged.
    """
    wrapped, model = model, unwrapped(model)
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
    return wrapped


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's and DataParallel's wrappers.

    Raises: InputError: For DistributedDataParallel, which would not average the gradients of new parameters.
    """
    match model:
        case OptimizedModule():
            return unwrapped(model._orig_mod)
        case nn.DataParallel():
            return unwrapped(model.module)
        case nn.parallel.DistributedDataParallel():
            raise InputError("invalid model in DistributedDataParallel, which would not average the gradients of new "
                             "parameters; expected its module, wrapped afterwards")  # fmt: skip
        case _:
            return model


def _lines(attentions: Sequence[BlockAttention], logs: Iterable[Iterable[Carried]]) -> list[Carried]:
    """The outcome for every tensor, by its name in the model. A tensor that the model lacks is initialised to zeros."""
    return [
        replace(line, name=f"{attention.name}.attn.{line.name}", verdict="initialised", how="zeros")
        if line.name in attention.lacking and line.verdict == "kept"
        else replace(line, name=f"{attention.name}.attn.{line.name}")
        for attention, log in zip(attentions, logs, strict=True)
        for line in log
    ]


def _outside(model: nn.Module, blocks: list[str]) -> int:
    """The number of tensors in the state dict outside the attention of `blocks`."""
    inside = tuple(f"{name}.attn." for name in blocks)
    return sum(not name.startswith(inside) for name in model.state_dict())


def _remember(model: nn.Module, specs: tuple[MixerSpec, ...]) -> None:
    """Update the arguments that a saved configuration and timm's resizing use."""
    if isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        remember(model, mixer=" | ".join(map(str, specs)), window_size=None)
    if isinstance(model, SwinTransformer):  # timm scales these with the grid
        model._ref_window_sizes = window_sides(specs, model._ref_window_sizes)
        model._ref_grid_size = tuple(model.patch_embed.grid_size)
    if not isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        setattr(model, "no_weight_decay", partial(no_weight_decay, model))  # noqa: B010 - a method of its class


def no_weight_decay(model: Any) -> set[str]:
    """The parameters that the class of a stock model excludes from weight decay, and the relative tables, as in
    Swin."""
    return {*type(model).no_weight_decay(model), *table_names(model)}


# ---- the table -------------------------------------------------------------------------------------------


def _merged(lines: tuple[Carried, ...]) -> list[tuple[str, str, str]]:
    """One row for the tensors of several blocks with the same outcome: ``blocks.0-11.attn.q.weight``."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for line in lines:
        head, block, tail = re.split(r"(?<=blocks\.)(\d+)", line.name, maxsplit=1)
        alike.setdefault((f"{head}{{}}{tail}", line.verdict, line.how), []).append(int(block))
    return [(name.format(_ranges(blocks)), verdict, how) for (name, verdict, how), blocks in alike.items()]


def _ranges(numbers: list[int]) -> str:
    """``0-11``, or ``0,2,4`` for numbers that are not consecutive."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
