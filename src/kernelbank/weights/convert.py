"""A state dict from one dialect to another: every tensor accounted for, and back again bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.backbone import check_image
from kernelbank.weights.architecture import Architecture, Family, infer
from kernelbank.weights.dialects import Dialect, detect, named
from kernelbank.weights.file import unwrap
from kernelbank.weights.from_timm import CLASSES
from kernelbank.weights.keymap import Shapes, State, cover, listed


@dataclass(frozen=True)
class Source:
    """A state that was read: `pivot` is the same under timm's keys, without what was `dropped` (with the reason) and
    the `derived` buffers."""

    state: State
    dialect: Dialect
    pivot: State
    architecture: Architecture
    dropped: Mapping[str, str]
    derived: tuple[str, ...]


Architect = Callable[[Family, State], Architecture]
"""Tells the architecture of a state under timm's keys."""


def read(state: State, architect: Architect = infer) -> Source:
    """Find the dialect of `state`, and take it under timm's keys; `architect` tells the architecture, by default off
    the shapes.

    Raises InputError naming tensors that are missing, left over or of another shape, or buffers that are not what
    the architecture gives.
    """
    dialect = detect(state)
    derived = tuple(key for key in state if dialect.is_derived(key))
    try:
        pivot, dropped = dialect.keys.into({key: tensor for key, tensor in state.items() if key not in derived})
    except InputError as error:
        raise InputError(f"{dialect.name}: {error}") from None
    architecture = architect(dialect.family, pivot)
    if architecture.family != dialect.family:
        raise InputError(f"the tensors are those of a {dialect.family} model ({dialect.name}), not of a "
                         f"{architecture.family} one")  # fmt: skip
    architecture = replace(architecture, pad=dialect.pad or architecture.pad)
    check_image(architecture.image, architecture.arguments["patch_size"])
    cover(pivot, pivot_shapes(architecture), f"{dialect.name} against timm's model")
    buffers = dialect.buffers(architecture)
    wrong = [
        key for key in derived if key not in buffers or not _equal(state[key].to(buffers[key].dtype), buffers[key])
    ]
    if wrong:
        raise InputError(f"{listed(wrong)}: not what images of {architecture.image[0]} x {architecture.image[1]} give")
    return Source(state, dialect, pivot, architecture, dropped, derived)


def write(source: Source, to: Dialect) -> State:
    """The state of `source` in another dialect, its derived buffers made anew. Raises InputError naming tensors that
    it has no place for."""
    try:
        made = to.keys.back(source.pivot, our_shapes(source.architecture) if to.name == "kernelbank" else None)
    except InputError as error:
        raise InputError(f"{to.name}: {error}") from None
    return made | to.buffers(source.architecture)


def convert_state(state: Mapping[str, object], to: str, architect: Architect = infer) -> State:
    """A state dict, or what wraps one in a checkpoint, in another dialect by its name.

    ``convert_state(torch.load(path, weights_only=True), "timm")``. Raises InputError as `read` and `write`.
    """
    source = read(unwrap(state, "state"), architect)
    return write(source, named(to, source.dialect.family))


def differing(source: Source, state: State, to: Dialect) -> list[str]:
    """Which tensors of `source` are not bit by bit what comes back from `state`, its dropped ones apart."""
    kept = {key: tensor for key, tensor in state.items() if not to.is_derived(key)}
    pivot, _ = to.keys.into(kept)
    again = source.dialect.keys.back(
        pivot, our_shapes(source.architecture) if source.dialect.name == "kernelbank" else None
    )
    buffers = source.dialect.buffers(source.architecture)
    again |= {key: buffer.to(source.state[key].dtype) for key, buffer in buffers.items() if key in source.state}
    there = {key: tensor for key, tensor in source.state.items() if key not in source.dropped}
    return sorted(
        key
        for key in there.keys() | again.keys()
        if key not in there or key not in again or not _equal(there[key], again[key])
    )


def pivot_shapes(architecture: Architecture) -> Shapes:
    """What timm's model of this architecture holds."""
    with torch.device("meta"):
        return _shapes(architecture.build())


def our_shapes(architecture: Architecture) -> Shapes:
    """What our backbone of this architecture holds."""
    backbone = CLASSES[architecture.family](
        *architecture.records(), **architecture.trunk(), weight_init="skip", device="meta"
    )
    return _shapes(backbone)


def _shapes(model: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
