"""The page: everything that it shows, packed into one HTML file that needs no network."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from markupsafe import Markup
from torch import Tensor

from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.picture import Picture
from kernelbank.explanation.statistics import TITLES, HeadStatistics, head_taps, mean
from kernelbank.spec import Dynamic, TwoStep
from kernelbank.spec.support import visible_pairs

LARGEST_MAPS = 4_000_000
"""Weights on a page that are stored in 8 bits beside their scores; above it the scores are left out."""
MOST_WEIGHTS = 60_000_000
"""Weights that a page may have: about 50 MB."""
COARSE, FINE = 31, 255
LARGEST_LAYER = 1_000_000
"""Weights of one layer that are stored in 8 bits where the page exceeds `LARGEST_MAPS`; above it they have 5."""
SCRIPTS = ("data.js", "draw.js", "panel.js", "page.js")
FOOTER = (
    "Weights have 8 bits and a scale per position and head. Orange is positive, blue is negative, the neutral colour "
    "is 0; what a position does not see has no colour. The effective number of kernels is exp of the entropy of the "
    "weights' absolute values."
)


@dataclass(frozen=True)
class Shown:
    """What the page shows of a model on one picture: its layers, their statistics, and the top classes by name."""

    picture: Picture
    layers: tuple[LayerMaps, ...]
    statistics: list[HeadStatistics]
    classes: list[tuple[str, float]]


@dataclass(frozen=True)
class Column:
    """A model on the page, with the names of its tokens before the grid."""

    label: str
    note: str
    shown: list[Shown]
    prefix: tuple[str, ...] = ()


class Blobs:
    """Arrays packed into compressed texts, each with an id."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def add(self, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Pack arrays by name; what the page needs to read them."""
        types = {np.dtype("u1"): "u8", np.dtype("i1"): "i8", np.dtype("<f4"): "f32"}
        parts, buffer = [], io.BytesIO()
        for name, array in arrays.items():
            parts.append([name, types[array.dtype], buffer.tell(), array.size])
            buffer.write(np.ascontiguousarray(array).tobytes())
        identifier = f"b{len(self.texts)}"
        self.texts.append((identifier, base64.b64encode(zlib.compress(buffer.getvalue(), 7)).decode("ascii")))
        return {"id": identifier, "parts": parts}


def render(title: str, columns: Sequence[Column]) -> str:
    """The page of one model, or of two side by side, as HTML."""
    blobs = Blobs()
    weights = sum(map_size(layer) for column in columns for shown in column.shown for layer in shown.layers)
    models = [_column(column, blobs, weights <= LARGEST_MAPS) for column in columns]
    data = {
        "models": models, "statistics": TITLES,
        "start": {"depth": max(len(model["layers"]) for model in models) // 2},
    }  # fmt: skip
    assets = files("kernelbank.explanation") / "assets"
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string((assets / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title, models=columns, footer=FOOTER, blobs=[(name, Markup(text)) for name, text in blobs.texts],
        css=Markup((assets / "page.css").read_text(encoding="utf-8")), data=Markup(_json(data)),
        scripts=[Markup((assets / name).read_text(encoding="utf-8")) for name in SCRIPTS],
    )  # fmt: skip


def _json(data: object) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _column(column: Column, blobs: Blobs, small: bool) -> dict[str, Any]:
    first = column.shown[0]
    layers = [_shared(layer, blobs) for layer in first.layers]
    for shown in column.shown:
        for layer, document in zip(shown.layers, layers, strict=True):
            own = [head for head in shown.statistics if head.layer == layer.name]
            arrays, meta = _arrays(layer, small)
            meta["statistics"] = {name: mean(own, name) for name in TITLES}
            document["images"].append({"blob": blobs.add(arrays), "meta": meta})
    images = [
        {"name": shown.picture.name, "notes": list(shown.picture.notes), "src": _source(shown.picture),
         "classes": [[name, round(share, 5)] for name, share in shown.classes]}
        for shown in column.shown
    ]  # fmt: skip
    return {"label": column.label, "layers": layers, "images": images, "prefix": column.prefix}


def map_size(layer: LayerMaps) -> int:
    """How many weights the map of all positions of a layer has, for one picture and the heads of `layer`. On a padded
    grid it is the number that the same windows have without padding, which is close."""
    if not isinstance(layer.spec.kernel, TwoStep) or layer.weights is None:
        return 0
    if isinstance(layer.spec.bank, Dynamic):
        seen = visible_pairs(layer.spec.support, layer.grid, layer.prefix, layer.stride)
    else:
        seen = (layer.prefix + layer.grid[0] * layer.grid[1]) * layer.weights.sizes["kernel"]
    return len(layer.heads) * seen


def _source(picture: Picture) -> str:
    """The picture as a data URI."""
    buffer = io.BytesIO()
    picture.sharp.convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# ---- layers ----------------------------------------------------------------------------------------------


def _shared(layer: LayerMaps, blobs: Blobs) -> dict[str, Any]:
    """What of a layer is the same for every picture."""
    document: dict[str, Any] = {
        "name": layer.name, "spec": str(layer.spec), "grid": list(layer.grid), "prefix": layer.prefix,
        "heads": len(layer.heads), "size": layer.spec.size, "activation": layer.spec.text["activation"],
        "kind": _kind(layer), "place": layer.origin is not None, "stride": layer.stride, "notes": _notes(layer),
        "rows": None, "columns": None, "table": None, "shared": None, "images": [],
    }  # fmt: skip
    if layer.index is not None:
        document["rows"], document["columns"] = _lines(layer)
    if layer.table is not None:
        values, scales = _signed(layer.table.values.flatten(1))
        prefix = layer.prefix_table.values.tolist() if layer.prefix_table is not None else []
        at = (layer.rows[layer.prefix :] - layer.prefix).view(layer.grid)
        width = layer.geometry.grid[1]
        document["table"] = {
            "sides": list(layer.table.values.shape[1:]), "scales": scales.tolist(), "prefix": prefix,
            "rows": (at[:, 0] // width).tolist(), "columns": (at[0] % width).tolist(),
        }  # fmt: skip
        document["shared"] = blobs.add({"table": values})
    return document


def _kind(layer: LayerMaps) -> str:
    """How the page draws a layer: `map` from weights, `gate` from one number per position, `kernel` from taps."""
    if isinstance(layer.spec.kernel, TwoStep):
        return "map"
    return "gate" if layer.gate is not None and layer.static is not None else "kernel"


def _notes(layer: LayerMaps) -> list[str]:
    notes = []
    if layer.mixing is not None:
        notes.append(f"{layer.mixing.values.shape[1]} learned mixtures of the kernels, carried back to the image")
    if _kind(layer) == "kernel" and layer.spec.size == 1:
        notes.append("one weight per channel: no position is selected")
    if layer.coefficients is None and layer.kernels is not None and layer.weights is None:
        notes.append("a static kernel, the same for every image")
    if layer.stride > 1:
        notes.append(f"a kernel for every {layer.stride} x {layer.stride} positions")
    return notes


def _lines(layer: LayerMaps) -> tuple[list[list[int]], list[list[int]]]:
    """The rows that each row of the grid sees, and the columns that each column sees."""
    assert layer.index is not None and layer.origin is not None
    height, width = layer.grid
    cells = (layer.tokens - layer.prefix)[layer.prefix :].view(height, width, -1)
    return (
        [sorted({int(c) // width for c in cells[y, 0] if c >= 0}) for y in range(height)],
        [sorted({int(c) % width for c in cells[0, x] if c >= 0}) for x in range(width)],
    )


def _arrays(layer: LayerMaps, small: bool) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """The arrays of a layer on one picture, and what the page needs to read them."""
    meta: dict[str, Any] = {"coefficients": None}
    if layer.coefficients is not None:
        meta["coefficients"] = [float(value) for value in layer.coefficients.values[0]]
    if _kind(layer) == "map":
        return _map_arrays(layer, small, meta)
    if _kind(layer) == "gate":
        assert layer.gate is not None and layer.weights is not None  # the weights of a position are all 1 / n_i
        return {"gate": _floats((layer.gate.values * layer.weights.values[..., 0])[0])}, meta
    taps = head_taps(layer)[0][:, list(layer.heads)]  # (P, h, t)
    values, scales = _signed(taps)
    return {"kernels": values, "kernels_scale": _floats(scales)}, meta | {"kernel_positions": taps.shape[0]}


def _map_arrays(
    layer: LayerMaps, small: bool, meta: dict[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    effective = layer.effective
    assert effective is not None and layer.scores is not None
    levels = FINE if small or map_size(layer) <= LARGEST_LAYER else COARSE
    parts = {"map": effective.values[0]}
    if small and layer.mixing is None:
        parts["scores"] = layer.scores.values[0]
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in parts.items():
        in_order = _in_order(layer, values)
        negative = bool((in_order < 0).any())
        steps = 127 if negative else levels
        packed, scales = _signed(in_order) if negative else _unsigned(in_order, levels)
        arrays |= {name: packed, f"{name}_scale": _floats(scales)}
        meta |= {f"{name}_levels": steps, "slots": in_order.shape[-1]}
    return arrays, meta | {"kernels": parts["map"].shape[-1], "coarse": levels == COARSE, "scores": "scores" in parts}


def _in_order(layer: LayerMaps, values: Tensor) -> Tensor:
    """A map whose kernel axis runs over the prefix and then the cells that a position sees, row by row, padding left
    out: (h, T, m)."""
    if layer.index is None or layer.origin is None:
        return values
    kernels = layer.tokens
    last = layer.prefix + layer.grid[0] * layer.grid[1]
    order = torch.where(kernels >= 0, kernels, last).argsort(1)
    present = kernels.gather(1, order) >= 0
    return torch.where(present, values.gather(2, order.expand(len(values), -1, -1)), 0)


# ---- quantisation ----------------------------------------------------------------------------------------


def _signed(values: Tensor) -> tuple[np.ndarray[Any, Any], Tensor]:
    """(integers from -127 to 127, the value of 127) along the last axis."""
    scale = values.abs().amax(-1)
    packed = (values / scale.clamp(min=1e-30)[..., None] * 127).round().to(torch.int8)
    return packed.cpu().numpy(), scale


def _unsigned(values: Tensor, levels: int) -> tuple[np.ndarray[Any, Any], Tensor]:
    """(integers from 0 to `levels`, the value of `levels`) along the last axis."""
    scale = values.amax(-1)
    packed = (values / scale.clamp(min=1e-30)[..., None] * levels).round().to(torch.uint8)
    return packed.cpu().numpy(), scale


def _floats(values: Tensor) -> np.ndarray[Any, Any]:
    return values.float().cpu().numpy().astype("<f4")
