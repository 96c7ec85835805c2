"""`build`: create a model from its description."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial
from typing import Any, cast

import timm
from timm.layers import LayerNorm
from torch import nn

from kernelbank.errors import InputError, SpecError
from kernelbank.model import ModelSpec, SwinTrunk, TimmTrunk, ViTTrunk
from kernelbank.nn.backbone import Backbone, HierarchicalBackbone, PlainBackbone
from kernelbank.nn.edit.replace import replace_mixers


def build(spec: ModelSpec, **options: Any) -> nn.Module:
    """Create the model of `spec`. `options` are further arguments of its class, which the description does not contain:
    ``weight_init``, ``device``, ``dtype``, and ``pretrained`` of a stock model.

    A `TimmTrunk` is created by timm; a mixer of the spec then replaces those that it has (see `replace_mixers`).

    Raises:
        SpecError: If the specs do not fit the trunk.
        InputError: If timm refuses the name or the arguments of a stock model.
    """
    if isinstance(spec.trunk, TimmTrunk):
        model = _create(spec, spec.trunk, options)
        return model if spec.mixer is None else replace_mixers(model, spec.mixer)
    return build_backbone(spec, **options)


def build_backbone(spec: ModelSpec, **options: Any) -> Backbone:
    """`build` for a trunk of this library."""
    arguments = backbone_arguments(spec) | dropout_arguments(spec) | options
    return PlainBackbone(**arguments) if isinstance(spec.trunk, ViTTrunk) else HierarchicalBackbone(**arguments)


def dropout_arguments(spec: ModelSpec) -> dict[str, float]:
    """The dropout rates of `spec` as arguments of its backbone class. Raises SpecError for one that it lacks."""
    rates = asdict(spec.dropout)
    if isinstance(spec.trunk, SwinTrunk) and (rate := rates.pop("pos_drop_rate")):
        raise SpecError(f"invalid pos_drop_rate={rate}; expected 0, since a {SwinTrunk.family} trunk has no positions")
    return rates


def backbone_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return `spec` as the arguments of its backbone class, without dropout. All are plain values that timm can write
    to a configuration file, except a norm whose epsilon is not the default.

    Raises:
        SpecError: If the trunk is a stock model of timm.
    """
    trunk = spec.trunk
    if isinstance(trunk, TimmTrunk):
        raise SpecError(f"invalid trunk={trunk.name}; expected a {ViTTrunk.family} or {SwinTrunk.family} trunk")
    arguments = {f.name: getattr(trunk, f.name) for f in fields(trunk) if f.name != "norm_eps"}
    arguments |= {name: getattr(spec, name) for name in ("mixer", "mlp", "img_size", "in_chans", "num_classes")}
    if trunk.norm_eps != type(trunk).norm_eps:
        arguments["norm_layer"] = partial(LayerNorm, eps=trunk.norm_eps)
    return arguments


def _create(spec: ModelSpec, trunk: TimmTrunk, options: dict[str, Any]) -> nn.Module:
    rates = {name: rate for name, rate in asdict(spec.dropout).items() if rate}
    arguments = {**trunk.arguments, "num_classes": spec.num_classes, "in_chans": spec.in_chans, **rates, **options}
    if spec.img_size is not None:
        arguments["img_size"] = spec.img_size
    try:
        return cast(nn.Module, timm.create_model(trunk.name, **arguments))
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, (SpecError, InputError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"model {trunk.name} cannot be built with {arguments}: {reason}") from None
