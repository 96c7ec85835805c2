"""timm's rotary position embeddings as the position `rope(...)` of a spec."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3

from kernelbank.errors import InputError
from kernelbank.ops.rotation import turns
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid

TOLERANCE = 1e-3
"""The largest difference between cosines and sines, which timm computes in float32."""


def rotation(rope: Any, rotate_half: bool, grid: Grid, width: int) -> str:
    """Return the position of `rope`, a module of timm's, for heads of `width` channels, as text.

    Raises: InputError: For another class of module, an option that `rope(...)` does not have, and where the angles on
        `grid` differ from those of the module.
    """
    common = {"theta": rope_number(rope), "layout": "half" if rotate_half else "interleaved",
              "axes": {"ij": "yx", "xy": "xy"}.get(getattr(rope, "grid_indexing", "ij"), "yx")}  # fmt: skip
    match rope:
        case RotaryEmbeddingDinoV3():
            _check(rope, min_period=None, max_period=None, grid_offset=0.0, aug_active=False)
            if rope.normalize_coords != "separate" and grid[0] != grid[1]:
                raise InputError(f"invalid normalize_coords={rope.normalize_coords!r} of rope; expected 'separate', "
                                 "or a square grid")  # fmt: skip
            arguments = common | {"coordinates": "unit"}
        case RotaryEmbeddingCat():
            _check(rope, in_pixels=False, linear_bands=False, grid_type="index", aug_active=False)
            arguments = common | {"origin": _whole(rope.grid_offset)}
            if rope.ref_feat_shape is not None:
                arguments["side"] = _side(rope.ref_feat_shape)
        case _:
            raise InputError(f"invalid rope, a {type(rope).__name__}, whose angles are learned or have more axes; "
                             "expected RotaryEmbeddingCat or RotaryEmbeddingDinoV3")  # fmt: skip
    text = f"rope({', '.join(f'{name}={value}' for name, value in arguments.items())})"
    _compare(rope, text, grid, width)
    return text


def rope_number(rope: Any) -> Any:
    """The base of the frequencies. Raises InputError for a module that has none."""
    theta = getattr(rope, "temperature", None)
    if theta is None:
        raise InputError(f"invalid rope, a {type(rope).__name__} without temperature; expected one with")
    return float(theta)


def _check(rope: Any, **expected: object) -> None:
    for name, value in expected.items():
        if (found := getattr(rope, name)) != value:
            raise InputError(f"invalid {name}={found} of rope; expected {value}")


def _whole(offset: float) -> int:
    if offset != int(offset) or offset < 0:
        raise InputError(f"invalid grid_offset={offset} of rope; expected a whole number >= 0")
    return int(offset)


def _side(shape: Any) -> int:
    if shape[0] != shape[1]:
        raise InputError(f"invalid ref_feat_shape={tuple(shape)} of rope; expected a square")
    return int(shape[0])


def _compare(rope: Any, text: str, grid: Grid, width: int) -> None:
    """Raise InputError unless the angles of the spec are those of the module."""
    shape = None if getattr(rope, "feat_shape", None) is not None else list(grid)
    theirs = rope.get_embed(shape)
    if theirs.is_meta:
        return
    position: Any = MixerSpec.parse(f"vit position={''.join(text.split())}").position
    cos, sin = turns(position, grid, 0, width, torch.float64, theirs.device)
    ours = torch.cat([sin, cos], -1)
    if theirs.shape != ours.shape or (theirs.double() - ours).abs().max() > TOLERANCE:
        raise InputError(f"invalid rope, a {type(rope).__name__}, whose angles differ from those of {text}")
