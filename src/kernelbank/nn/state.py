"""State dicts that a mixer loads besides its own: timm's, and those in which an FFN's kernels are stacked by head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

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
    for theirs, ours in _renames(state, prefix, spec, shapes):
        tensor, shape = state.get(f"{prefix}{theirs}"), shapes.get(ours)
        if tensor is not None and shape is not None and tensor.numel() == math.prod(shape):
            state[f"{prefix}{ours}"] = state.pop(f"{prefix}{theirs}").reshape(shape)
    state.pop(f"{prefix}{INDEX}", None)


def _split_fused(state: State, prefix: str, shapes: Shapes) -> None:
    """Replace a fused linear by its parts where they are equally large."""
    for theirs, ours in FUSED.items():
        rows = {shapes[f"{name}.weight"][0] for name in ours if f"{name}.weight" in shapes}
        for kind in KINDS:
            fused = state.get(f"{prefix}{theirs}.{kind}")
            if fused is not None and len(rows) == 1 and fused.shape[:1] == (len(ours) * min(rows),):
                parts = state.pop(f"{prefix}{theirs}.{kind}").chunk(len(ours))
                state |= {f"{prefix}{name}.{kind}": part for name, part in zip(ours, parts, strict=True)}


def _renames(state: State, prefix: str, spec: MixerSpec, shapes: Shapes) -> Iterator[tuple[str, str]]:
    """The pairs (name in `state`, our name) of tensors that only change their name and shape."""
    linears = dict(RENAMED)
    key = shapes.get("key.weight", ())
    if isinstance(spec.bank, Static) and (len(key) == 2 or key[:1] == (1,)):  # kernels of one head
        linears |= FFN
        yield from ((f"{name}.{kind}", f"{name}.{kind}") for name in FFN.values() for kind in KINDS
                    if _stacked(state.get(f"{prefix}{name}.{kind}"), shapes.get(f"{name}.{kind}")))  # fmt: skip
    yield from ((f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in linears.items() for kind in KINDS)
    table = state.get(f"{prefix}{TABLE}")
    if table is not None and table.ndim == 2 and OUR_TABLE in shapes:
        state[f"{prefix}{TABLE}"] = table.t()
        yield TABLE, OUR_TABLE
        side = math.isqrt(table.shape[0])
        if side**2 == table.shape[0] and f"{prefix}{TABLE}" in state:  # of another window
            state[f"{prefix}{OUR_TABLE}"] = state.pop(f"{prefix}{TABLE}").unflatten(1, (side, side))


def _stacked(tensor: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    """Whether `tensor` has this shape but for axes of length 1 around it."""
    if tensor is None or shape is None or tensor.ndim <= len(shape):
        return False
    return tensor.shape[0] == 1 and tuple(tensor.shape[1 : len(shape) + 1]) in (shape, shape[:1]) \
        and tensor.numel() == math.prod(shape)  # fmt: skip
