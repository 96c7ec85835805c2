"""Translate state dicts for a mixer: those of timm, and those of version 0.1, where the kernels of an FFN have an axis
for heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from kernelbank.nn.timm_names import FFN, FUSED, INDEX, OUR_TABLE, RENAMED, TABLE
from kernelbank.spec import Dynamic, MixerSpec, Static, TwoStep
from kernelbank.spec.inventory import Tensor as Entry

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
KINDS = ("weight", "bias")


def translate(state: State, prefix: str, spec: MixerSpec, entries: Iterable[Entry]) -> None:
    """Rename and reshape, in place, the tensors of `state` under `prefix` for a mixer of `spec` with these `entries`.

    timm's qkv, proj and relative_position_bias_table, and fc1 and fc2 for an FFN, get our names. The kernels of an
    FFN may also be (1, K, C, 1, 1), (1, K) and (1, C, K), as version 0.1 saved them. What does not fit keeps its name,
    for load_state_dict to report.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    if isinstance(spec.bank, Dynamic) and isinstance(spec.kernel, TwoStep):
        _split_fused(state, prefix, shapes)
    linears, key = dict(RENAMED), shapes.get("key.weight", ())
    if isinstance(spec.bank, Static) and (len(key) == 2 or key[:1] == (1,)):  # the kernels of one head
        linears |= FFN
        _unstack(state, prefix, shapes)
    for theirs, ours in linears.items():
        for kind in KINDS:
            _rename(state, f"{prefix}{theirs}.{kind}", f"{prefix}{ours}.{kind}", shapes.get(f"{ours}.{kind}"))
    _rename_table(state, prefix, shapes.get(OUR_TABLE))
    state.pop(f"{prefix}{INDEX}", None)


def _rename(state: State, theirs: str, ours: str, shape: tuple[int, ...] | None) -> None:
    """Move `theirs` to `ours` in the given shape, where it has as many elements."""
    tensor = state.get(theirs)
    if tensor is not None and shape is not None and tensor.numel() == math.prod(shape):
        state[ours] = state.pop(theirs).reshape(shape)


def _split_fused(state: State, prefix: str, shapes: Shapes) -> None:
    """Split a fused linear layer into its parts, which must have equal sizes."""
    for theirs, ours in FUSED.items():
        rows = {shapes[f"{name}.weight"][0] for name in ours if f"{name}.weight" in shapes}
        for kind in KINDS:
            fused = state.get(f"{prefix}{theirs}.{kind}")
            if fused is not None and len(rows) == 1 and fused.shape[:1] == (len(ours) * min(rows),):
                parts = state.pop(f"{prefix}{theirs}.{kind}").chunk(len(ours))
                state |= {f"{prefix}{name}.{kind}": part for name, part in zip(ours, parts, strict=True)}


def _unstack(state: State, prefix: str, shapes: Shapes) -> None:
    """Reshape kernels with an axis for heads to the weights of linear layers."""
    for name in (f"{linear}.{kind}" for linear in FFN.values() for kind in KINDS):
        tensor, shape = state.get(f"{prefix}{name}"), shapes.get(name)
        if tensor is not None and shape is not None and tuple(tensor.shape) in ((1, *shape), (1, *shape, 1, 1)):
            state[f"{prefix}{name}"] = tensor.reshape(shape)


def _rename_table(state: State, prefix: str, shape: tuple[int, ...] | None) -> None:
    """Replace timm's relative table by ours. A square table of another window keeps its size."""
    table = state.get(f"{prefix}{TABLE}")
    if table is None or table.ndim != 2 or shape is None:
        return
    side = math.isqrt(table.shape[0])
    if table.numel() == math.prod(shape):
        state[f"{prefix}{OUR_TABLE}"] = state.pop(f"{prefix}{TABLE}").t().reshape(shape)
    elif side**2 == table.shape[0]:
        state[f"{prefix}{OUR_TABLE}"] = state.pop(f"{prefix}{TABLE}").t().unflatten(1, (side, side))
