"""Which models of timm share the keys and shapes of a state: their shapes do not tell them apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import timm
from torch import Tensor, nn

from kernelbank.errors import InputError, SpecError
from kernelbank.model import Dropout, ModelSpec
from kernelbank.weights.from_timm import create, read_model
from kernelbank.weights.infer import Family, Inferred
from kernelbank.weights.keymap import Shapes, listed
from kernelbank.weights.stock import with_padding

MODULES: dict[Family, tuple[str, ...]] = {
    "vit": ("vision_transformer", "deit"), "swin": ("swin_transformer",),
}  # fmt: skip
"""The modules of timm whose models have the keys of a family."""
ONE_BLOCK: dict[Family, dict[str, Any]] = {"vit": {"depth": 1}, "swin": {}}
"""Arguments for a model that is quick to build and has the shapes of the whole one, apart from its depth."""
DYNAMIC = {"vit": ("dynamic_img_size", "dynamic_img_pad"), "swin": ("dynamic_img_size",)}


Architecture = ModelSpec | str
"""The description of a model, or why our trunks cannot hold it."""


def settle(family: Family, state: Mapping[str, Tensor], inferred: Inferred) -> Inferred:
    """`inferred`, or the description of timm's model where exactly one architecture of timm has the keys and shapes of
    `state`, which is under timm's keys. It stays an assumption.

    Raises:
        InputError: If several architectures of timm have them, or one that our trunks cannot hold: the models are named
            and the user is asked for one.
    """
    known = alike(family, state, inferred.spec)
    if len(known) > 1:
        named = "; ".join(listed(names) for names in known.values())
        raise InputError(f"{len(known)} architectures of timm have these keys and shapes, and compute different "
                         f"outputs: {named}; state one with --model")  # fmt: skip
    for architecture, names in known.items():
        if isinstance(architecture, str):
            raise InputError(f"the keys and shapes are those of timm's {listed(names)}: {architecture}; state another "
                             "model with --model")  # fmt: skip
        if architecture != _plain(inferred.spec):
            only = f"timm's {listed(names)}, its only architecture with these keys and shapes"
            return Inferred(replace(architecture, name=inferred.spec.name), (only,))
    return inferred


def alike(family: Family, state: Mapping[str, Tensor], spec: ModelSpec) -> dict[Architecture, list[str]]:
    """The names of timm's models that have the keys and shapes of `state`, by architecture. `spec` gives the sizes of
    input and output."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    known: dict[Architecture, list[str]] = {}
    for name in _candidates(family, shapes["patch_embed.proj.weight"][2]):
        sizes = {"num_classes": spec.num_classes, "in_chans": spec.in_chans, "img_size": spec.image}
        first = _build(name, sizes | ONE_BLOCK[family])
        if first is None or any(shapes.get(key) != shape for key, shape in first[1].items()):
            continue
        whole = _build(name, sizes)
        if whole is not None and whole[1] == shapes:
            known.setdefault(_architecture(whole[0]), []).append(name)
    return known


def _candidates(family: Family, patch: int) -> Iterator[str]:
    """The names of timm's models of a family, without those that name another patch size."""
    for module in MODULES[family]:
        for name in timm.list_models(module=module):
            stated = re.search(r"patch(\d+)", name)
            if stated is None or int(stated[1]) == patch:
                yield name


def _build(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, Shapes] | None:
    """timm's model of this name and its shapes, None where its class does not take the arguments."""
    try:
        model = create(name, meta=True, **arguments)
    except InputError:
        return None
    return model, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _architecture(model: nn.Module) -> Architecture:
    try:
        return _plain(read_model(model))
    except (InputError, SpecError) as error:
        return str(error)


def _plain(spec: ModelSpec) -> ModelSpec:
    """`spec` without what does not tell its outputs in eval mode at its own image size."""
    fixed: dict[str, Any] = dict.fromkeys(DYNAMIC[spec.trunk.family], False)
    trunk = replace(spec.trunk, **fixed)
    return with_padding(replace(spec, trunk=trunk, name="", dropout=Dropout()), "timm").canonical()
