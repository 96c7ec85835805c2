"""Implementations of the operator. A path is a file of this package and an entry here. `ops.plan` chooses the first
entry that supports a call and is preferred for it."""

from __future__ import annotations

from kernelbank.ops.paths import (
    associated,
    blocks,
    bottleneck,
    conv,
    images,
    linear,
    literal,
    pointwise,
    sdpa,
    shifts,
    toeplitz,
    triton,
    vectorised,
    windows,
)
from kernelbank.ops.paths.path import LinearPath, MixerPath, PathError, PositionPath, Slot

_MIXER: tuple[MixerPath, ...] = (
    *triton.PATHS,
    bottleneck.PATH,
    blocks.PATH,
    windows.SOFTMAX,
    windows.PATH,
    associated.AFFINE,
    associated.MOMENTS,
    sdpa.PATH,
    pointwise.ONEDNN,
    pointwise.PATH,
    shifts.PATH,
    images.PATH,
    vectorised.PATH,
    conv.PATH,
    literal.PATH,
)

MIXER_PATHS: dict[str, MixerPath] = {path.name: path for path in _MIXER}
"""The mixer paths by name, in the order of the plan. `vectorised` supports what the ones before it do not; the last two
run only if they are forced."""
LINEAR_PATHS: dict[str, LinearPath] = {path.name: path for path in linear.PATHS}
POSITION_PATHS: dict[str, PositionPath] = {path.name: path for path in (triton.POSITION, *toeplitz.PATHS)}

SLOTS: dict[str, Slot] = {
    **dict.fromkeys(MIXER_PATHS, "mixer"),
    **dict.fromkeys(LINEAR_PATHS, "linear"),
    **dict.fromkeys(POSITION_PATHS, "position"),
}
"""The part of the operator that each path runs, by the path's name."""

__all__ = ["LINEAR_PATHS", "MIXER_PATHS", "POSITION_PATHS", "SLOTS", "PathError"]
