"""`replace_mixers`: replace the mixer of every block of a trained model, and report the outcome for each tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

from timm.models._features import FeatureGetterNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from kernelbank.errors import InputError
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone, remember, table_names, window_sides
from kernelbank.nn.edit.carry import Carried, carry
from kernelbank.nn.edit.stock import BlockAttention, LeftAttention, block_attentions, left_attentions
from kernelbank.spec import MixerSpec, SpecError
from kernelbank.spec.mixer_spec import stage_texts
from kernelbank.text import columns


@dataclass(frozen=True)
class Replaced:
    """The outcome of `replace_mixers`. Its string is a table.

    Attributes:
        specs: The specs of the stages.
        lines: The outcome for every tensor of every mixer.
        others: The number of tensors outside the mixers, which stay.
        left: The token mixers that stay, since no spec describes them.
    """

    specs: tuple[MixerSpec, ...]
    lines: tuple[Carried, ...]
    others: int
    left: tuple[LeftAttention, ...] = ()

    def __str__(self) -> str:
        rows = [("tensor", "verdict", "how"), *_merged(self.lines), (f"{self.others} tensors outside", "kept", "")]
        rows += [(left.name, "left", left.reason) for left in self.left]
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
        model: A model of timm with an adapter (``kernelbank atlas --coverage`` lists the classes), or a backbone of
            this library. It may be compiled, in DataParallel, or made with ``features_only``: the model inside is
            changed, and has ``replaced``.
        text: A spec for all stages, or one per stage separated by ``|``. Cells alone (``"activation=relu,count"``)
            change the spec that the model has.

    Raises:
        InputError: For another model, or attention that no spec describes. The model is then unchanged.
        SpecError: For a spec that does not exist or does not fit. The model is then unchanged.
    """
    wrapped, model = model, unwrapped(model)
    attentions = list(block_attentions(model))
    if not attentions:
        left = "".join(f" ({left.name}: {left.reason})" for left in list(left_attentions(model))[:1])
        raise InputError(f"invalid model without blocks that a spec describes{left}; expected at least one")
    specs = _stage_specs(attentions, text)
    for attention, spec in zip(attentions, specs, strict=True):
        if (spec.frame == "bn_relu") != (attention.spec.frame == "bn_relu"):
            raise SpecError(f"invalid frame={spec.frame} in place of {attention.spec.frame}: bn_relu has BatchNorm "
                            "around it, other frames LayerNorm; expected a backbone built with the spec")  # fmt: skip
    results = [carry(old.mixer, spec.at_block(old.index)) for old, spec in zip(attentions, specs, strict=True)]
    names = [attention.name for attention in attentions]
    lines = _lines(attentions, [log for _, log in results])
    stages = {attention.stage: spec for attention, spec in zip(reversed(attentions), reversed(specs), strict=True)}
    by_stage = tuple(stages[stage] for stage in sorted(stages))
    report = Replaced(by_stage, tuple(lines), _outside(model, names), tuple(left_attentions(model)))
    for attention, spec, (mixer, _) in zip(attentions, specs, results, strict=True):
        attention.place(spec, mixer)
    _remember(model, by_stage)
    setattr(model, "replaced", report)  # noqa: B010 - the type of a module knows no such attribute
    return wrapped


def _stage_specs(attentions: Sequence[BlockAttention], text: str) -> list[MixerSpec]:
    """The spec of every block, an alternating shift unresolved: the text of its stage, on what it has."""
    texts = stage_texts(text, 1 + max(attention.stage for attention in attentions))
    read = cache(MixerSpec.parse)
    return [read(texts[attention.stage], attention.spec) for attention in attentions]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DataParallel and timm's `features_only`.

    Raises: InputError: For DistributedDataParallel, which would not average the gradients of new parameters.
    """
    match model:
        case OptimizedModule():
            return unwrapped(model._orig_mod)
        case nn.DataParallel():
            return unwrapped(model.module)
        case FeatureGetterNet():
            return unwrapped(model.model)
        case nn.parallel.DistributedDataParallel():
            raise InputError("invalid model in DistributedDataParallel, which would not average the gradients of new "
                             "parameters; expected its module, wrapped afterwards")  # fmt: skip
        case _:
            return model


def _lines(attentions: Sequence[BlockAttention], logs: Iterable[Iterable[Carried]]) -> list[Carried]:
    """The outcome for every tensor, by its name in the model. A tensor that the model lacks is initialised to zeros."""
    return [
        replace(line, name=f"{attention.name}.{line.name}", verdict="initialised", how="zeros")
        if line.name in attention.lacking and line.verdict == "kept"
        else replace(line, name=f"{attention.name}.{line.name}")
        for attention, log in zip(attentions, logs, strict=True)
        for line in log
    ]


def _outside(model: nn.Module, names: list[str]) -> int:
    """The number of tensors in the state dict outside the mixers with these names."""
    inside = tuple(f"{name}." for name in names)
    return sum(not name.startswith(inside) for name in model.state_dict())


def _remember(model: nn.Module, specs: tuple[MixerSpec, ...]) -> None:
    """Update the arguments that a saved configuration and timm's resizing use."""
    if isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        remember(model, mixer=" | ".join(map(str, specs)), window_size=None, qk_norm=None)
    if isinstance(model, (SwinTransformer, SwinTransformerV2)):  # timm scales these with the grid
        model._ref_window_sizes = window_sides(specs, model._ref_window_sizes)
        model._ref_grid_size = tuple(model.patch_embed.grid_size)
    if not isinstance(model, (PlainBackbone, HierarchicalBackbone)):
        setattr(model, "no_weight_decay", partial(no_weight_decay, model))  # noqa: B010 - a method of its class


def no_weight_decay(model: Any) -> set[str]:
    """The parameters that the class of a stock model excludes from weight decay, and the relative tables, as in
    Swin."""
    stated = getattr(type(model), "no_weight_decay", None)
    return {*(stated(model) if stated else ()), *table_names(model)}


# ---- the table -------------------------------------------------------------------------------------------


def _merged(lines: tuple[Carried, ...]) -> list[tuple[str, str, str]]:
    """One row for the tensors of several blocks with the same outcome: ``blocks.0-11.attn.q.weight``."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for line in lines:
        head, block, tail = _numbered(line.name)
        alike.setdefault((f"{head}{{}}{tail}", line.verdict, line.how), []).append(int(block))
    return [(name.format(_ranges(blocks)), verdict, how) for (name, verdict, how), blocks in alike.items()]


def _numbered(name: str) -> tuple[str, str, str]:
    """The name of a tensor of a mixer in three parts, of which the second is its last number, that of the block."""
    head, block, tail = re.split(r"(?<=\.)(\d+)(?=\.\D*$)", name, maxsplit=1)
    return head, block, tail


def _ranges(numbers: list[int]) -> str:
    """``0-11``, or ``0,2,4`` for numbers that are not consecutive."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
