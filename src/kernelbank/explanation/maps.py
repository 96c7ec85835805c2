"""The maps and kernels of a mixer from its tensors and its input, by the equations of the operator.

Everything that depends on the modules of `ops` and `nn` is in this file and in `capture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.explanation.layer import CHUNK, MAP, LayerMaps
from kernelbank.explanation.named import NamedTensor
from kernelbank.nn.linears import called_modules, named_tensors
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.activation import activate
from kernelbank.ops.bank import TwoStepBank, two_step_bank
from kernelbank.ops.context import Context, check_input, check_mask
from kernelbank.ops.frame import enter
from kernelbank.ops.geometry import Geometry, geometry, pad_tokens, unfold
from kernelbank.ops.kernel import queries
from kernelbank.ops.mix import coefficients, generated_kernel, learned_kernel, project
from kernelbank.ops.precision import full_precision, wide
from kernelbank.spec import (
    Box,
    Depthwise,
    Dynamic,
    Full,
    Neighborhood,
    Own,
    Predict,
    Project,
    TwoStep,
    Window,
)
from kernelbank.spec.inventory import Grid
from kernelbank.spec.support import seen

Params = Mapping[str, Tensor]
Wanted = Sequence[int | tuple[int, int]]
"""Positions as token numbers, prefix first, or as (row, column) of the grid."""


def layer_maps(
    name: str,
    mixer: Mixer,
    x: Tensor,
    grid: Grid,
    mask: Tensor | None,
    heads: Sequence[int] | None,
    positions: Wanted | None,
) -> LayerMaps:
    """The maps of `mixer`, called `name`, on tokens x (B, T, C) of `grid`, as its forward in eval mode has them.

    Raises:
        InputError: If the mixer has no such head or position.
        SpecError: If x or the mask does not fit the mixer.
    """
    with torch.no_grad(), full_precision(x):
        p, s = _context(mixer, x, grid, mask)
        x = x.to(next((t.dtype for t in p.values() if t.is_floating_point()), x.dtype))
        padded = pad_tokens(x, s.geo)
        operand, source = enter(padded, p, s)
        chosen = _chosen_heads(name, s.heads, heads)
        tokens = _tokens(name, positions, grid, mixer.prefix)
        rows = _rows(s.geo, tokens)
        maps = LayerMaps(
            name=name, spec=mixer.spec, grid=grid, prefix=mixer.prefix, geometry=s.geo, num_heads=s.heads,
            heads=chosen, positions=tokens, operand=NamedTensor(operand, ("image", "position", "channel")), rows=rows,
        )  # fmt: skip
        if isinstance(mixer.spec.kernel, TwoStep):
            return _with_regions(_two_step(maps, source, p, s))
        if isinstance(mixer.spec.bank, Dynamic):
            return _with_regions(_generated(maps, source, p, s))
        return _learned(maps, source, p, s)


def _context(mixer: Mixer, x: Tensor, grid: Grid, mask: Tensor | None) -> tuple[Params, Context]:
    """Copies of the mixer's tensors on `grid`, so that writing to a map leaves the model alone, and its context in
    eval mode."""
    check_input(x, mixer.spec, grid, mixer.prefix)
    modules = called_modules(mixer, mixer.linears)
    tensors = {name: t.detach().clone() for name, t in named_tensors(mixer, mixer.entries, modules).items()}
    if grid != mixer.grid:
        tensors = mixer.tensors_on(grid, tensors)
    geo = geometry(mixer.spec, grid, mixer.prefix, x.device)
    visible = None if mask is None else check_mask(mask, x, mixer.spec)
    return tensors, Context(mixer.spec, mixer.dim, mixer.num_heads, geo, mask=visible, modules=modules)


# ---- heads and positions ---------------------------------------------------------------------------------


def _chosen_heads(name: str, count: int, heads: Sequence[int] | None) -> tuple[int, ...]:
    """The heads that were asked for, all of them with None."""
    for head in heads or ():
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < count:
            raise InputError(f"invalid heads={head!r} in layer {name}; expected 0 to {count - 1}")
    return tuple(range(count) if heads is None else heads)


def _tokens(name: str, positions: Wanted | None, grid: Grid, prefix: int) -> tuple[int, ...]:
    """Positions as token numbers, all tokens with None."""
    count = prefix + grid[0] * grid[1]
    if positions is None:
        return tuple(range(count))
    tokens = []
    for position in positions:
        pair = position if isinstance(position, tuple) and len(position) == 2 else None
        inside = pair is not None and all(0 <= at < side for at, side in zip(pair, grid, strict=True))
        token = prefix + pair[0] * grid[1] + pair[1] if pair is not None and inside else position
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
            raise InputError(f"invalid positions={position!r} in layer {name}; expected a token from 0 to {count - 1} "
                             f"or (row, column) on the {grid[0]} x {grid[1]} grid")  # fmt: skip
        tokens.append(token)
    return tuple(tokens)


def _rows(geo: Geometry, tokens: tuple[int, ...]) -> Tensor:
    """The tokens of the padded grid at which `tokens` lie."""
    at = torch.tensor(tokens, dtype=torch.long, device=geo.device)
    if geo.layout is None:
        return at
    cells = geo.layout.new_empty(int(geo.layout.max()) + 1)
    filled = geo.layout >= 0
    cells[geo.layout[filled]] = filled.nonzero()[:, 0]
    return torch.where(at < geo.prefix, at, cells[(at - geo.prefix).clamp(min=0)] + geo.prefix)


def _index(s: Context, rows: Tensor) -> Tensor | None:
    """The kernels that each of `rows` sees, (rows, m), -1 after the last one; None where all see the whole bank, and
    under a mask, which belongs to the image."""
    geo, P = s.geo, s.geo.prefix
    if geo.visible is None or s.mask is not None:
        return None
    if isinstance(geo.support, Own):
        return rows[:, None]
    down, along = (seen(geo.support, side) for side in geo.grid)
    width = geo.grid[1]
    everything = list(range(geo.tokens))
    lists = []
    for row in rows.tolist():
        y, x = divmod(row - P, width)
        cells = [P + r * width + c for r in down[y] for c in along[x]] if row >= P else everything[P:]
        lists.append([*range(P), *cells])
    longest = max(map(len, lists), default=0)
    return torch.tensor([[*entry, *[-1] * (longest - len(entry))] for entry in lists], dtype=torch.long,
                        device=geo.device)  # fmt: skip


def _origin(s: Context) -> Tensor:
    """The token at which each kernel of a generated bank was generated, -1 in padding."""
    assert isinstance(s.spec.bank, Dynamic)
    P, (height, width), stride = s.geo.prefix, s.geo.grid, s.spec.bank.stride
    prefix = torch.arange(P, device=s.geo.device)
    if s.geo.layout is not None:
        return torch.cat([prefix, torch.where(s.geo.layout >= 0, s.geo.layout + P, -1)])
    down, along = (torch.arange(0, side, stride, device=s.geo.device) for side in (height, width))
    return torch.cat([prefix, (P + down[:, None] * width + along).flatten()])


def _with_regions(maps: LayerMaps) -> LayerMaps:
    """`maps` with the rectangle that each position sees, for windows and neighbourhoods."""
    if maps.index is None or maps.origin is None or not isinstance(maps.spec.support, (Window, Neighborhood)):
        return maps
    tokens = maps.tokens
    on_grid, cells = tokens >= maps.prefix, tokens - maps.prefix
    sides = []
    for at in (cells // maps.grid[1], cells % maps.grid[1]):
        low = torch.where(on_grid, at, max(maps.grid)).amin(1)
        high = torch.where(on_grid, at, -1).amax(1) + 1
        sides.append((low, high))
    (top, bottom), (left, right) = sides
    return replace(maps, regions=NamedTensor(torch.stack([top, left, bottom, right], 1), ("position", "side")))


# ---- two_step --------------------------------------------------------------------------------------------


def _two_step(maps: LayerMaps, source: Tensor, p: Params, s: Context) -> LayerMaps:
    """a_ij = phi(scale q_i . k_j + p_ij)."""
    heads = list(maps.heads)
    bank = project(two_step_bank(source, p, s), p, s)
    q = queries(maps.operand.values, p, s)[:, heads]
    q = q.to(wide(q.dtype))
    key, value = (_all_images(t[:, heads].to(q.dtype), len(q)) for t in (bank.key, bank.value))
    dense = any(step.axis == "positions" for step in s.spec.activation)  # it needs every position that sees a kernel
    index = None if dense else _index(s, maps.rows)
    rows = torch.arange(s.geo.tokens, device=q.device) if dense else maps.rows
    static = _static(p, s, heads, rows, index)
    scores = _scores(q[:, :, rows] * bank.scale, key, index)
    if bank.key_bias is not None:
        scores = scores + bank.key_bias[heads]
    visible = _visible(s, rows, index)
    own = {name: t[heads] if name.startswith("activation_norm.") else t for name, t in p.items()}
    a = activate(scores if static is None else scores + static, visible, s.spec.activation, own)
    if visible is not None:
        scores = torch.where(visible, scores, 0)
    if dense:
        a, scores = a[:, :, maps.rows], scores[:, :, maps.rows]
        static = None if static is None else static[:, maps.rows]
    return replace(
        maps, weights=NamedTensor(a, MAP), scores=NamedTensor(scores, MAP), index=_named(index, "position", "kernel"),
        mask=_mask(s, maps.rows, len(q)),
        values=NamedTensor(value, ("image", "head", "kernel", "channel")),
        keys=NamedTensor(key, ("image", "head", "kernel", "channel")),
        queries=NamedTensor(q[:, :, maps.rows], ("image", "head", "position", "channel")),
        bias=_bias(bank, len(q)), origin=_named(_origin(s), "kernel") if isinstance(s.spec.bank, Dynamic) else None,
        mixing=_named(p.get("F", p["E"]), "kernel", "mixture") if isinstance(s.spec.mix, Project) else None,
        **_positional(static, p, s, heads),
    )  # fmt: skip


def _mask(s: Context, rows: Tensor, images: int) -> Any:
    """What `rows` see under a mask."""
    if s.mask is None:
        return None
    assert s.visible is not None
    return _named(s.visible[:, 0, rows].expand(images, -1, -1), "image", "position", "kernel")


def _bias(bank: TwoStepBank, images: int) -> NamedTensor | None:
    """The bias of a static bank's values."""
    return None if bank.value_bias is None else NamedTensor(bank.value_bias.expand(images, -1), ("image", "channel"))


def _all_images(bank: Tensor, images: int) -> Tensor:
    return bank.expand(images, *bank.shape[1:])


def _scores(q: Tensor, key: Tensor, index: Tensor | None) -> Tensor:
    """q_i . k_j of the kernels that `index` lists, (B, h, T, m), or of all."""
    if index is None:
        return q @ key.mT
    parts = []
    for start in range(0, len(index), CHUNK):
        chosen = key[:, :, index[start : start + CHUNK].clamp(min=0)]  # (B, h, rows, m, d)
        parts.append((chosen @ q[:, :, start : start + CHUNK, :, None]).squeeze(-1))
    return torch.cat(parts, 2)


def _visible(s: Context, rows: Tensor, index: Tensor | None) -> Tensor | None:
    """What of the kernel axis is visible, broadcastable to (B, h, T, m); None where all of it is."""
    if index is not None:
        return (index >= 0)[None, None]
    return None if s.visible is None else s.visible[:, :, rows]


# ---- the relative table ----------------------------------------------------------------------------------


def _static(p: Params, s: Context, heads: list[int], rows: Tensor, index: Tensor | None) -> Tensor | None:
    """p_ij of some heads, (h, T, m), zero where position i does not see kernel j; None without a relative position."""
    if s.geo.sides is None:
        return None
    entries = p["table.weight"][heads].flatten(1)
    if s.geo.prefix:
        entries = torch.cat([entries, p["table.prefix"][heads]], 1)
    kernels = torch.arange(s.geo.tokens, device=rows.device)[None] if index is None else index.clamp(min=0)
    height, width = p["table.weight"].shape[1:]
    offsets = _offsets(rows[:, None], kernels, (height // 2 + 1, width // 2 + 1), s.geo)
    static = entries[:, offsets]
    static = static.to(wide(static.dtype))
    if index is not None:
        return torch.where(index >= 0, static, 0)
    return static if s.geo.visible is None else torch.where(s.geo.visible[rows], static, 0)


def _offsets(rows: Tensor, kernels: Tensor, sides: Grid, geo: Geometry) -> Tensor:
    """The entry of the flattened table at offset i - j in steps of the support, then the three of the prefix: prefix to
    grid, grid to prefix, prefix to prefix."""
    (a, b), P, width, (down, along) = sides, geo.prefix, geo.grid[1], geo.steps
    i, j = (rows - P).clamp(min=0), (kernels - P).clamp(min=0)
    dy = (i // width // down - j // width // down).clamp(1 - a, a - 1) + a - 1
    dx = (i % width // along - j % width // along).clamp(1 - b, b - 1) + b - 1
    entry = dy * (2 * b - 1) + dx
    first = (2 * a - 1) * (2 * b - 1)
    entry = torch.where(rows < P, first, torch.where(kernels < P, first + 1, entry))
    return torch.where((rows < P) & (kernels < P), first + 2, entry)


def _positional(static: Tensor | None, p: Params, s: Context, heads: list[int]) -> dict[str, Any]:
    """The positional fields of `LayerMaps`."""
    if static is None:
        return {}
    prefix = NamedTensor(p["table.prefix"][heads], ("head", "entry")) if s.geo.prefix else None
    table = NamedTensor(p["table.weight"][heads], ("head", "row offset", "column offset"))
    return {"static": NamedTensor(static, ("head", "position", "kernel")), "table": table, "prefix_table": prefix}


# ---- one step --------------------------------------------------------------------------------------------


def _generated(maps: LayerMaps, source: Tensor, p: Params, s: Context) -> LayerMaps:
    """The kernel of each position is the mean of the kernels that it sees, or generated from their mean feature."""
    heads, size, rows = list(maps.heads), s.spec.size, maps.rows
    kernel, taps = generated_kernel(source, p, s)  # (B, 1 or T, R, t), (B, n, R, t)
    kernel = kernel if kernel.shape[1] == 1 else kernel[:, rows]
    index = _index(s, rows)
    visible = _visible(s, rows, index)
    bank = len(_origin(s))
    if visible is None:
        weights = kernel.new_full((), 1 / bank).expand(1, 1, len(rows), bank)
    else:
        weights = visible.to(kernel.dtype)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    static = _static(p, s, heads, rows, index)
    values = taps.sum(-1).unflatten(-1, (s.heads, -1)).transpose(1, 2)[:, heads] if static is not None else None
    by_head = maps.operand.values[:, rows].unflatten(-1, (s.heads, -1)).transpose(1, 2)[:, heads]
    gated = isinstance(s.spec.kernel, Depthwise) and size == 1
    return replace(
        maps, kernels=_of_positions(kernel.unflatten(-1, (size, size))), weights=NamedTensor(weights, MAP),
        index=_named(index, "position", "kernel"), origin=_named(_origin(s), "kernel"),
        values=_named(values, "image", "head", "kernel", "channel"), mask=_mask(s, rows, len(taps)),
        gate=NamedTensor(by_head.mean(-1), ("image", "head", "position")) if gated else None,
        bias=_named(p["bias"][None], "image", "channel") if "bias" in p else None,
        **_positional(static, p, s, heads),
    )  # fmt: skip


def _learned(maps: LayerMaps, source: Tensor, p: Params, s: Context) -> LayerMaps:
    """Static kernels, those that predicted coefficients mix, and `box`."""
    size = s.spec.size
    if isinstance(s.spec.bank, Box):
        inside = unfold(torch.ones_like(maps.operand.values[:1, :, :1]), size, s.geo)[:, maps.rows]  # (1, T, 1, t)
        kernel = inside / inside.sum(-1, keepdim=True)
        kernel[..., size * size // 2] -= 1
        return replace(maps, kernels=_of_positions(kernel.unflatten(-1, (size, size))))
    weight, bias = learned_kernel(source, p, s)  # (B or 1, C_out, C_in/g, k, k)
    pi = coefficients(source, p, s) if isinstance(s.spec.mix, Predict) else None
    bias = bias.expand(len(weight), -1) if bias is not None else None
    full = isinstance(s.spec.kernel, Full)
    kernels = NamedTensor(weight, ("image", "output", "input", "row", "column")) if full \
        else _of_positions(weight[:, :, 0][:, None])  # fmt: skip
    return replace(maps, kernels=kernels, coefficients=_named(pi, "image", "kernel"),
                   bias=_named(bias, "image", "channel"))  # fmt: skip


def _of_positions(kernels: Tensor) -> NamedTensor:
    return NamedTensor(kernels, ("image", "position", "group", "row", "column"))


def _named(tensor: Tensor | None, *axes: str) -> Any:
    return None if tensor is None else NamedTensor(tensor.detach(), axes)
