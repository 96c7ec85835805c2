"""Files of KernelBank 0.1: the entries of ``kernelbank convert`` and ``kernelbank train`` as a `ModelSpec`, and their
states under the names and shapes of today."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from kernelbank.errors import SpecError
from kernelbank.model import RESERVED_ARGUMENTS, Dropout, ModelSpec, TimmTrunk
from kernelbank.nn.build import build
from kernelbank.nn.mixer import Mixer
from kernelbank.nn.state import translate
from kernelbank.zoo import find

FAMILIES = {"plain": "vit", "hierarchical": "swin"}
OF_SPECS = frozenset({"mlp_ratio", "qkv_bias", "proj_bias", "act_layer", "window_size"})
"""Arguments of timm's classes that the specs stated a second time."""
OF_MODEL = ("img_size", "in_chans", "num_classes")
TRAINED = {"name", "mixer", "mlp", "arguments", "num_classes", "in_chans", "img_size"}
"""The fields of the entry of ``kernelbank train``."""


def converted(document: Mapping[str, Any]) -> ModelSpec:
    """The model of the entry ``kernelbank`` of ``kernelbank convert``. Raises ValueError if it is damaged."""
    arguments = document.get("arguments")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"invalid arguments={arguments!r}; expected a JSON object")
    family = document.get("family")
    trunk = {key: value for key, value in arguments.items() if key not in OF_SPECS and key not in OF_MODEL}
    sizes = {key: arguments[key] for key in OF_MODEL if key in arguments}
    return ModelSpec.from_document({
        "model_version": 2, "family": FAMILIES.get(family, family) if isinstance(family, str) else family,
        "trunk": trunk | {"norm_eps": document.get("norm_eps")}, "mixer": document.get("mixer"),
        "mlp": document.get("mlp"), "name": document.get("source", ""), **sizes,
    })  # fmt: skip


def trained(metadata: Mapping[str, str]) -> ModelSpec | None:
    """The model of the entry ``model`` of ``kernelbank train``, None without one: files of others may have an entry of
    this name. Raises ValueError if it is damaged."""
    try:
        document = json.loads(metadata.get("model", ""))
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.keys() != TRAINED:
        return None
    arguments, name, side = document["arguments"], document["name"], document["img_size"]
    if not isinstance(arguments, dict) or not isinstance(name, str):
        raise ValueError(f"invalid name={name!r}, arguments={arguments!r}; expected a name and a JSON object")
    rates = {f.name: arguments.pop(f.name) for f in fields(Dropout) if f.name in arguments}
    arguments = {key: value for key, value in arguments.items() if key not in RESERVED_ARGUMENTS}
    try:
        base = find(name)
    except SpecError:
        base = ModelSpec(trunk=TimmTrunk(name=name))
    whole = base.to_document()
    if isinstance(base.trunk, TimmTrunk):
        whole["trunk"]["arguments"] = arguments
    else:
        whole["trunk"] |= arguments
    stated = {key: document[key] for key in ("mixer", "mlp") if document[key] is not None}
    return ModelSpec.from_document({
        **whole, **stated, "name": name, "in_chans": document["in_chans"], "num_classes": document["num_classes"],
        "dropout": rates, "img_size": whole["img_size"] if side is None else [side, side],
    })  # fmt: skip


def upgraded(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """`state` with the weights of an FFN as linear layers, which 0.1 stacked by head."""
    options = {} if isinstance(spec.trunk, TimmTrunk) else {"device": "meta"}
    upgrade = dict(state)
    for path, module in build(spec, **options).named_modules():
        if isinstance(module, Mixer):
            translate(upgrade, f"{path}.", module.spec, module.entries)
    return upgrade
