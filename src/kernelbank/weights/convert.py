"""Convert state dicts between dialects. Every tensor is accounted for, and the way back gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.weights.contents import TRUNKS, WRAPPERS, check_held, find, other_parts, shared_prefix, without
from kernelbank.weights.dialects import DIALECTS, Dialect, detect, named
from kernelbank.weights.infer import Family, Inferred, infer
from kernelbank.weights.keymap import Shapes, State, cover, listed
from kernelbank.weights.stock import build_stock, check_padding, with_padding


@dataclass(frozen=True)
class SourceState:
    """A state dict and its translation.

    `state` has the tensors of the vision model alone, without the `prefix` that was before every key, and `pivot` has
    them under timm's keys, without the `dropped` tensors (with the reason) and the `derived` buffers. `spec` describes
    the model, `assumed` lists what is assumed of it, and `notes` say which weights of a file were taken.
    """

    state: State
    dialect: Dialect
    pivot: State
    spec: ModelSpec
    assumed: tuple[str, ...]
    dropped: Mapping[str, str]
    derived: tuple[str, ...]
    prefix: str = ""
    notes: tuple[str, ...] = ()

    @property
    def remaining(self) -> State:
        """The state that the library of the dialect loads: without the tensors that have no counterpart."""
        return _apart(self.state, self.dropped)

    @property
    def said(self) -> list[str]:
        """What was taken from the file, one sentence for each thing."""
        return [*self.notes, *([f"prefix: {self.prefix} removed from every key"] if self.prefix else [])]


Describe = Callable[[Family, State], Inferred]
"""A function that describes the model of a state under timm's keys."""


def read(state: State, describe: Describe = infer) -> SourceState:
    """Detect the dialect of `state` and translate it to timm's keys. `describe` describes its model, by default from
    the shapes. Parts that are not of the vision model are dropped (see `contents.OTHER_PARTS`).

    Raises:
        InputError: If a tensor is missing, left over or of another shape, or a buffer is not that of the model.
    """
    dialect, state, prefix, parts = locate(state)
    check_held(state, dialect.name)
    derived = tuple(key for key in state if dialect.is_derived(key))
    try:
        pivot, dropped = dialect.keys.into(_apart(state, derived))
    except InputError as error:
        raise InputError(f"{dialect.name}: {error}") from None
    inferred = describe(dialect.family, pivot)
    spec = inferred.spec
    if spec.trunk.family != dialect.family:
        raise InputError(f"the tensors are those of a {dialect.family} model ({dialect.name}); expected those of a "
                         f"{spec.trunk.family} model")  # fmt: skip
    spec = replace(spec, trunk=replace(spec.trunk, **dialect.trunk))
    if dialect.pad is not None:
        spec = with_padding(spec, dialect.pad)
    if wrong := [key for key, tensor in pivot.items() if not tensor.is_floating_point()]:
        raise InputError(f"{listed(wrong)}: invalid dtype {pivot[wrong[0]].dtype}; expected floating point")
    cover(pivot, pivot_shapes(spec), f"{dialect.name} against timm's model")
    buffers = dialect.buffers(spec)
    wrong = [
        key for key in derived if key not in buffers or not _equal(state[key].to(buffers[key].dtype), buffers[key])
    ]
    if wrong:
        raise InputError(f"{listed(wrong)}: not what images of {spec.image[0]} x {spec.image[1]} give")
    return SourceState(state, dialect, pivot, spec, inferred.assumed, parts | dropped, derived, prefix)


def locate(state: State) -> tuple[Dialect, State, str, dict[str, str]]:
    """(the dialect, the tensors under its keys, the prefix that was removed from them, the dropped parts with reasons).

    Prefixes of `contents.TRUNKS` are removed until a dialect has the keys. Raises InputError as `detect`.
    """
    inside, removed, parts = state, "", dict[str, str]()
    while True:
        others = other_parts(inside)
        parts |= {removed + key: reason for key, reason in others.items()}
        inside = _apart(inside, others)
        if any(dialect.matches(inside) for dialect in DIALECTS):
            return detect(inside), inside, removed, parts
        prefix = next((prefix for prefix in (*TRUNKS, *WRAPPERS) if shared_prefix(inside, (prefix,))), "")
        if not prefix:
            return detect(_apart(state, parts) or state), inside, removed, parts
        removed += prefix
        inside = without(inside, prefix)


def _apart(state: State, keys: Collection[str]) -> State:
    """`state` without `keys`."""
    return {key: tensor for key, tensor in state.items() if key not in keys}


def write(source: SourceState, to: Dialect) -> State:
    """The state of `source` in another dialect, its derived buffers made anew. Raises InputError naming tensors that
    it has no place for, and for windows that its library pads in another way."""
    try:
        to.check_trunk(source.spec)
        if to.pad is not None:
            check_padding(source.spec, to.pad)
        state = to.keys.back(source.pivot, to.shapes(source.spec))
    except InputError as error:
        raise InputError(f"{to.name}: {error}") from None
    return state | to.buffers(source.spec)


def convert_state(state: Mapping[str, object], to: str, describe: Describe = infer) -> State:
    """Convert a state dict, or a checkpoint that contains one, to the dialect `to`.

    ``convert_state(torch.load(path, weights_only=True), "timm")``. Raises InputError as `read` and `write`.
    """
    source = read(find(state, "state").state, describe)
    return write(source, named(to, source.dialect.family))


def differing(source: SourceState, state: State, to: Dialect) -> list[str]:
    """Return the names of the tensors of `source` that converting `state` back does not reproduce bit by bit. Dropped
    tensors do not count."""
    remaining = {key: tensor for key, tensor in state.items() if not to.is_derived(key)}
    pivot, _ = to.keys.into(remaining)
    again = source.dialect.keys.back(pivot, source.dialect.shapes(source.spec))
    buffers = source.dialect.buffers(source.spec)
    again |= {key: buffer.to(source.state[key].dtype) for key, buffer in buffers.items() if key in source.state}
    before = source.remaining
    return sorted(
        key
        for key in before.keys() | again.keys()
        if key not in before or key not in again or not _equal(before[key], again[key])
    )


def pivot_shapes(spec: ModelSpec) -> Shapes:
    """Return the shapes of timm's model of `spec`."""
    with torch.device("meta"):
        return _shapes(build_stock(spec))


def _shapes(model: nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
