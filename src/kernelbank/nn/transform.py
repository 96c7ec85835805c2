"""Transform the tensors of a mixer for another grid or spec, with pure, differentiable functions.

A tensor of the same name, shape and meaning stays as it is. Relative tables and the matrices of `project` are resampled
and rescaled, and kernels of another size keep their centre.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.errors import require
from kernelbank.ops.precision import wide
from kernelbank.spec import Dynamic, MixerSpec, TwoStep
from kernelbank.spec.inventory import Grid, extent
from kernelbank.spec.inventory import Tensor as Entry
from kernelbank.spec.support import visible_range


@dataclass(frozen=True)
class Placement:
    """A spec on a grid, before or after a change."""

    spec: MixerSpec
    grid: Grid
    prefix: int


Moved = tuple[Tensor, str]
"""The new tensor, and a description of the transformation, which is empty if the tensor was kept."""


def move(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """Return `source` as the tensor of `entry`, or None if it cannot be used."""
    kernels = entry.name.startswith(("key.", "value."))
    if kernels and type(before.spec.bank) is not type(after.spec.bank):
        return None
    if kernels and source.ndim != len(entry.shape):
        return _restacked(source, entry, before, after)
    return _TRANSFORMS.get(entry.name, _same_or_taps)(source, entry, before, after)


STACKED = {"key.weight": 5, "key.bias": 2, "value.weight": 3}
"""The number of axes of static two_step kernels in several heads. In one head of size 1, axes of length 1 are left
out."""


def _restacked(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """Static kernels, of which either the old or the new ones are in one head of size 1."""

    def stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
        missing = STACKED[entry.name] - len(shape)
        return (1, *shape, *(1,) * (missing - 1)) if missing else shape

    moved = _same_or_taps(
        source.reshape(stacked(source.shape)), replace(entry, shape=stacked(entry.shape)), before, after
    )
    return None if moved is None else (moved[0].reshape(entry.shape), moved[1] or "reshaped")


def move_all(
    tensors: Mapping[str, Tensor], entries: Iterable[Entry], before: Placement, after: Placement
) -> dict[str, Tensor]:
    """Return the tensors of a spec on another grid, by name. Tensors that `tensors` lacks are left out, and tensors of
    a shape that does not belong to the old grid stay as they are."""
    moved: dict[str, Tensor] = {}
    for entry in entries:
        if entry.name in tensors:
            result = move(tensors[entry.name], entry, before, after)
            moved[entry.name] = tensors[entry.name] if result is None else result[0]
    return moved


def _same_or_taps(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """A tensor of the same shape and meaning; a kernel of another size keeps its centre, with zeros around it."""
    old, new = before.spec.size, after.spec.size
    if entry.name in ("key.weight", "key.bias") and isinstance(before.spec.bank, Dynamic):
        return _generated(source, entry, old, new)
    if source.shape == entry.shape:
        return source, ""
    same = type(before.spec.kernel) is type(after.spec.kernel) and source.shape[-2:] == (old, old)
    if not same or (*source.shape[:-2], new, new) != entry.shape:
        return None
    return _centred(source, new), _centre_note(old, new)


def _generated(source: Tensor, entry: Entry, old: int, new: int) -> Moved | None:
    """A generator of kernels has R x size^2 outputs, with the taps of each of R channels or groups together. R must not
    change."""
    if source.ndim != len(entry.shape) or source.shape[1:] != entry.shape[1:]:
        return None
    if source.shape[0] * new**2 != entry.shape[0] * old**2:
        return None
    if old == new:
        return source, ""
    taps = source.movedim(0, -1).unflatten(-1, (-1, old, old))
    return _centred(taps, new).flatten(-3).movedim(-1, 0), _centre_note(old, new)


def _centre_note(old: int, new: int) -> str:
    return f"{old} x {old} taps in the centre of {new} x {new}"


def _centred(kernel: Tensor, size: int) -> Tensor:
    """Kernels (..., k, k) padded with zeros, or cropped, around the centre."""
    pad = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (pad, pad, pad, pad))


def _table(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """A relative table (h, 2a-1, 2b-1) on another extent, as timm resizes Swin's and BEiT's, times m_old / m_new."""
    if source.shape[0] != entry.shape[0]:
        return None
    notes, table = [], source
    if source.shape != entry.shape:
        require("resampling a relative table", "train", "timm")
        from timm.layers import resize_rel_pos_bias_table  # noqa: PLC0415 - the operator needs torch alone

        window = extent(after.spec, after.grid)
        with warnings.catch_warnings():  # timm's interpolation indexes by lists and searches strided grids
            warnings.filterwarnings("ignore", message=".*non-(contiguous|tuple)", category=UserWarning)
            table = resize_rel_pos_bias_table(source, new_window_size=window, new_bias_shape=entry.shape)
        notes.append(f"resampled from {side(source.shape[1:])} to {side(entry.shape[1:])}")
    factor = summed(before.spec, _visible(before)) / summed(after.spec, _visible(after))
    return _rescaled(table, factor, notes)


def _prefix_table(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """table.prefix (h, 3). A prefix query sums over the whole grid. The other two entries belong to prefix kernels,
    whose number stays, so that only a change of the activation rescales them."""
    if source.shape != entry.shape:
        return None
    over_grid = summed(before.spec, math.prod(before.grid)) / summed(after.spec, math.prod(after.grid))
    over_prefix = summed(before.spec, _visible(after)) / summed(after.spec, _visible(after))
    if over_grid == over_prefix:
        return _rescaled(source, over_grid, [])
    factors = source.new_tensor([over_grid, over_prefix, over_prefix])
    return source * factors, f"times {over_grid:.4g}, {over_prefix:.4g}, {over_prefix:.4g}"


def _projection(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """E or F (n, r), each column a map over the grid. Resampled as timm resamples position embeddings, and multiplied
    by N_old / N_new so that sums over the kernels keep their magnitude (docs/backbones.md)."""
    if source.shape[1:] != entry.shape[1:]:
        return None
    old, new = _cells(before), _cells(after)
    if old == new:
        return source, ""
    prefix, maps = source[: before.prefix], source[before.prefix :].unflatten(0, old).permute(2, 0, 1)[None]
    resized = F.interpolate(maps.to(wide(maps.dtype)), new, mode="bicubic", antialias=True)[0].flatten(1).mT
    factor = math.prod(old) / math.prod(new)
    how = f"resampled from {side(old)} to {side(new)}, times {factor:.4g}"
    return torch.cat([prefix, (resized * factor).to(source.dtype)]), how


def _norm(source: Tensor, entry: Entry, before: Placement, after: Placement) -> Moved | None:
    """q_norm is a norm per head in frame linear and a BatchNorm in bn_relu."""
    return (source, "") if before.spec.frame == after.spec.frame and source.shape == entry.shape else None


def _cells(placement: Placement) -> Grid:
    """The (pooled) grid that generates the bank."""
    bank, (height, width) = placement.spec.bank, placement.grid
    stride = bank.stride if isinstance(bank, Dynamic) else 1
    return math.ceil(height / stride), math.ceil(width / stride)


_TRANSFORMS: dict[str, Callable[[Tensor, Entry, Placement, Placement], Moved | None]] = {
    "table.weight": _table,
    "table.prefix": _prefix_table,
    "q_norm.weight": _norm,
    "q_norm.bias": _norm,
    "E": _projection,
    "F": _projection,
}


def _rescaled(tensor: Tensor, factor: float, notes: list[str]) -> Moved:
    if factor == 1:
        return tensor, ", ".join(notes)
    return tensor * factor, ", ".join([*notes, f"times {factor:.4g}"])


def _visible(placement: Placement) -> int:
    """n, the largest number of kernels of the grid that a position sees."""
    return visible_range(placement.spec.support, placement.grid)[1]


def summed(spec: MixerSpec, n: int) -> float:
    """m(n): the factor by which the output grows with a constant p over n visible kernels.

    It is n where p is summed without division (depth-wise kernels, and pipelines of `identity` and `scale` only),
    sqrt(n) with `sqrt_count`, and 1 where a normaliser or `count` makes it a mean. Keeping m(n) p keeps the magnitude
    of the term: a grid with twice the kernels halves p of depth-wise self-attention, and p of softmax attention is
    divided by n when depth-wise self-attention takes it over, as softmax does to first order (docs/backbones.md).
    """
    names = {step.name for step in spec.activation}
    if not isinstance(spec.kernel, TwoStep) or names <= {"identity", "scale"}:
        return n
    return math.sqrt(n) if names <= {"identity", "scale", "sqrt_count"} else 1


def side(shape: tuple[int, ...]) -> str:
    """``14 x 14``."""
    return " x ".join(map(str, shape))
