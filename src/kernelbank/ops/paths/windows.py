"""Windows per region. Tokens are put in the order of their regions once, before the linear layers. A group of equal
regions is then one batch of small images, and there is no N x N tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelbank.ops.bank import TwoStepBank, generate_taps, generator_dtype, two_step_bank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import Geometry, Offsets, cached, crop, pad_tokens
from kernelbank.ops.kernel import gate, queries, weigh
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import sdpa
from kernelbank.ops.paths.path import MixerPath, Reason, first
from kernelbank.ops.paths.toeplitz import dense, multiply
from kernelbank.ops.position import region_matrix
from kernelbank.ops.precision import full_precision, wide
from kernelbank.ops.transforms import recorded, transformed
from kernelbank.spec import All, Own, Pool, Rope, Support, TwoStep
from kernelbank.spec.inventory import Grid
from kernelbank.spec.support import Coordinates, seen

Cell = Callable[[Tensor, TwoStepBank, Tensor | None, Params, Context], Tensor]
"""(q (M, h, n, e), the bank of M regions, what is added to the scores, params, context) -> o (M, h, n, d)."""


class RegionGroup(NamedTuple):
    """Regions of one shape: the offsets of their rows and columns from the first ones, and the first cell (y, x) of
    each region."""

    offsets: Offsets
    corners: tuple[Grid, ...]

    @property
    def sides(self) -> Grid:
        """The numbers of rows and columns of a region."""
        return len(self.offsets[0]), len(self.offsets[1])

    @property
    def contiguous(self) -> bool:
        """Whether a region is a rectangle of neighbouring cells."""
        return all(axis[-1] + 1 == len(axis) for axis in self.offsets)

    def in_steps(self, steps: Grid) -> RegionGroup:
        """The group with offsets counted in steps of the support."""
        rows, columns = (tuple(at // step for at in axis) for axis, step in zip(self.offsets, steps, strict=True))
        return self._replace(offsets=(rows, columns))


def has_regions(support: Support, grid: Grid) -> bool:
    """Whether the positions fall into regions, each of which sees itself and nothing else."""
    if isinstance(support, (All, Own)):  # under `self` a prefix token sees nothing but itself
        return False
    return all(_is_partition(seen(support, side)) for side in grid)


def _is_partition(axis: tuple[Coordinates, ...]) -> bool:
    """Whether every coordinate sees itself, and all that it sees sees the same."""
    return all(at in region and all(axis[other] == region for other in region) for at, region in enumerate(axis))


def groups(support: Support, grid: Grid) -> tuple[RegionGroup, ...]:
    """The regions of the grid by shape."""
    return _group.__wrapped__(support, grid) if torch.compiler.is_compiling() else _group(support, grid)


@cache
def _group(support: Support, grid: Grid) -> tuple[RegionGroup, ...]:
    axes = [sorted(set(seen(support, side))) for side in grid]
    corners: dict[Offsets, list[Grid]] = {}
    for rows, columns in product(*axes):
        offsets = tuple(y - rows[0] for y in rows), tuple(x - columns[0] for x in columns)
        corners.setdefault(offsets, []).append((rows[0], columns[0]))
    return tuple(RegionGroup(offsets, tuple(at)) for offsets, at in corners.items())


def token_order(support: Support, grid: Grid, prefix: int, batch: int, device: torch.device | None = None) -> Tensor:
    """Rows of (B T) tokens in region order: by group, then image, region and cell; the prefix tokens come last."""
    starts, width = torch.arange(batch, device=device)[:, None] * (prefix + grid[0] * grid[1]), grid[1]
    parts = []
    for (rows, columns), corners in groups(support, grid):
        first = torch.tensor([y * width + x for y, x in corners], device=device)
        cells = torch.tensor([y * width + x for y in rows for x in columns], device=device)
        parts.append(prefix + (first[:, None] + cells).flatten())
    parts.append(torch.arange(prefix, device=device))
    return torch.cat([(starts + part).flatten() for part in parts])


def token_places(support: Support, grid: Grid, prefix: int, batch: int, device: torch.device | None = None) -> Tensor:
    """The inverse of `token_order`."""
    return token_order(support, grid, prefix, batch, device).argsort()


class _Reordered(torch.autograd.Function):
    """Rows in another order. Its gradient is the inverse order, where that of index_select is a sum."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _reorder(grads[0], inverse, order), None, None


def _reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]`."""
    if not (torch.is_grad_enabled() and rows.requires_grad) or transformed():
        return rows.index_select(0, order)
    return _Reordered.apply(rows, order, inverse)


class BatchOrder:
    """All tokens of a batch in region order, (B, T, X) -> (1, B T, X): a group of equal regions is contiguous."""

    def __init__(self, batch: int, geo: Geometry) -> None:
        self.batch, self.geo = batch, geo
        where = (geo.support, geo.grid, geo.prefix, batch, geo.device)
        self.order, self.places = cached(token_order, *where), cached(token_places, *where)

    def to_regions(self, x_BTX: Tensor) -> Tensor:
        """Into region order."""
        return _reorder(x_BTX.flatten(0, 1), self.order, self.places)[None]

    def from_regions(self, x_1MX: Tensor) -> Tensor:
        """Out of region order."""
        rows = _reorder(x_1MX[0], self.places, self.order)
        return rows.unflatten(0, (self.batch, self.geo.tokens))

    def parts(self, x_1MX: Tensor) -> tuple[list[Tensor], Tensor]:
        """Tokens in region order as (B, regions, n, ...) per group, and the prefix as (B, P, ...)."""
        shapes = [(self.batch, *shape) for shape in region_shapes(self.geo)]
        sizes = [B * R * n for B, R, n in shapes]
        *grid, prefix = x_1MX[0].split([*sizes, self.batch * self.geo.prefix])
        return [part.unflatten(0, shape) for part, shape in zip(grid, shapes, strict=True)], prefix.unflatten(
            0, (self.batch, self.geo.prefix)
        )

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `parts`, each (B, regions, n, X)."""
        return torch.cat([part.flatten(0, 2) for part in parts])[None]


class ImageOrder:
    """The tokens of each image in region order, (B, T, X) -> (B, T, X): the order does not depend on the batch, which a
    traced graph must not."""

    def __init__(self, geo: Geometry) -> None:
        self.geo = geo
        where = (geo.support, geo.grid, geo.prefix, 1, geo.device)
        self.order, self.places = cached(token_order, *where), cached(token_places, *where)

    def to_regions(self, x_BTX: Tensor) -> Tensor:
        """Into region order."""
        return x_BTX.index_select(1, self.order)

    def from_regions(self, x_BTX: Tensor) -> Tensor:
        """Out of region order."""
        return x_BTX.index_select(1, self.places)

    def parts(self, x_BTX: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `BatchOrder.parts`."""
        shapes = region_shapes(self.geo)
        *grid, prefix = x_BTX.split([*(R * n for R, n in shapes), self.geo.prefix], 1)
        return [part.unflatten(1, shape) for part, shape in zip(grid, shapes, strict=True)], prefix

    def join(self, parts: list[Tensor]) -> Tensor:
        """As `BatchOrder.join`."""
        return torch.cat([part.flatten(1, 2) for part in parts], 1)


Order = BatchOrder | ImageOrder


def region_shapes(geo: Geometry) -> list[tuple[int, int]]:
    """(regions, positions of a region) per group."""
    return [(len(group.corners), group.sides[0] * group.sides[1]) for group in groups(geo.support, geo.grid)]


def order_of(x_BTC: Tensor, geo: Geometry) -> Order:
    """By image for compilers and tracing, else by batch."""
    if recorded():
        return ImageOrder(geo)
    return BatchOrder(x_BTC.shape[0], geo)


def mixer(cell: Cell) -> Callable[[Tensor, Params, Context], Tensor]:
    """The mixer on windows, each region attended by `cell`."""

    def run(x_BTC: Tensor, p: Params, s: Context) -> Tensor:
        x_BTC = pad_tokens(x_BTC, s.geo)
        order = order_of(x_BTC, s.geo)
        if s.spec.size > 1:  # patches cross the regions
            operand, source = enter(x_BTC, p, s)
            q = order.to_regions(queries(operand, p, s).transpose(1, 2).flatten(2)).unflatten(2, (s.heads, -1))
            o = _two_step(q, order.to_regions(source), p, s, order, cell)
            return crop(leave(order.from_regions(o), p, s), s.geo)
        operand, source = enter(order.to_regions(x_BTC), p, s)
        if isinstance(s.spec.kernel, TwoStep):
            o = _two_step(queries(operand, p, s).transpose(1, 2), source, p, s, order, cell)
        else:
            o = _one_step(operand, source, p, s, order).to(operand.dtype)
        return crop(order.from_regions(leave(o, p, s)), s.geo)

    return run


def _two_step(q_LMhe: Tensor, source_LMC: Tensor, p: Params, s: Context, order: Order, cell: Cell) -> Tensor:
    """Every region with its own kernels and those of the prefix, then the prefix with all kernels; tokens in region
    order."""
    bank, P = two_step_bank(source_LMC, p, s), s.geo.prefix
    key_LMhe, value_LMhd = (t.transpose(1, 2) for t in (bank.key, bank.value))
    (queries_by, q_prefix), (keys, k_prefix), (values, v_prefix) = map(order.parts, (q_LMhe, key_LMhe, value_LMhd))
    outputs = []
    for group, q, k, v in zip(groups(s.geo.support, s.geo.grid), queries_by, keys, values, strict=True):
        if P:
            k, v = (
                torch.cat([first[:, None].expand(-1, t.shape[1], -1, -1, -1), t], 2)
                for first, t in ((k_prefix, k), (v_prefix, v))
            )
        o = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bank, _added(p, s, group), p, s, cell)
        outputs.append(o.view(*q.shape[:3], s.dim))
    if P:
        k, v = (order.from_regions(t.flatten(2)).unflatten(2, (s.heads, -1)) for t in (key_LMhe, value_LMhd))
        outputs.append(_attend(q_prefix, k, v, bank, _added_to_prefix(p, s), p, s, cell)[:, None])
    return order.join(outputs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bank: TwoStepBank, added: Tensor | None, p: Params, s: Context, cell: Cell
) -> Tensor:
    """(M, n, h, .) tokens of M regions -> (M, n, C)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return cell(q, bank._replace(key=k, value=v), added, p, s).transpose(1, 2).flatten(2)


def products(q: Tensor, bank: TwoStepBank, added: Tensor | None, p: Params, s: Context) -> Tensor:
    """A region by two matrix products."""
    return weigh((q * bank.scale) @ bank.key.mT, added, None, p, s).to(bank.value.dtype) @ bank.value


def softmax(q: Tensor, bank: TwoStepBank, added: Tensor | None, p: Params, s: Context) -> Tensor:
    """A region by torch's fused attention."""
    return sdpa.fused(q, bank, added, None, s)


def _added(p: Params, s: Context, group: RegionGroup) -> Tensor | None:
    """The relative position of a region's queries to the prefix's kernels and its own, (h, n, P + n)."""
    if s.geo.sides is None:
        return None
    return region_matrix(p, group.in_steps(s.geo.steps).offsets, s.geo.prefix, s.geo.device)[:, s.geo.prefix :]


def _added_to_prefix(p: Params, s: Context) -> Tensor | None:
    """The relative position of the prefix to every kernel, (h, P, T)."""
    if s.geo.sides is None:
        return None
    P, entries = s.geo.prefix, p["table.prefix"][:, None]
    row = torch.cat([entries[..., 2:].expand(-1, P, P), entries[..., :1].expand(-1, P, s.geo.tokens - P)], 2)
    return row


def _one_step(operand_LMC: Tensor, source_LMC: Tensor, p: Params, s: Context, order: Order) -> Tensor:
    """A gate per region, which is the mean of its kernels, and the positional term inside it."""
    with full_precision(source_LMC):
        features = source_LMC.to(generator_dtype(p, s))
        pooled = isinstance(s.spec.mix, Pool)
        averaged = features if pooled else generate_taps(features, p, s)[0]
        parts, prefix = order.parts(averaged.to(wide(averaged.dtype)))
        means = _means(parts, prefix)
        if pooled:
            sizes = [mean.shape[0] * mean.shape[1] for mean in means]
            rows = torch.cat([mean.flatten(0, 1) for mean in means]).to(features.dtype)
            kernels = generate_taps(rows[None], p, s)[0][0].split(sizes)
            means = [
                kernel.view(*mean.shape[:2], kernel.shape[-1]) for kernel, mean in zip(kernels, means, strict=True)
            ]
    operands, q_prefix = order.parts(operand_LMC)
    if s.geo.prefix:
        operands, parts = [*operands, q_prefix[:, None]], [*parts, prefix[:, None]]
    outputs = []
    terms = _positional_terms(parts, prefix, p, s)
    for q, mean, term in zip(operands, means, terms, strict=True):
        outputs.append(gate(q, mean[:, :, None, :, None], term).to(q.dtype))
    o = order.join(outputs)
    return o + p["bias"] if "bias" in p else o


def _means(parts: list[Tensor], prefix: Tensor) -> list[Tensor]:
    """The mean of each region with the prefix, (B, regions, X) per group, then that of the image, (B, 1, X)."""
    P, first = prefix.shape[1], prefix.sum(1, keepdim=True)
    sums = [part.sum(2) for part in parts]
    means = [(total + first) / (part.shape[2] + P) if P else total / part.shape[2]
             for total, part in zip(sums, parts, strict=True)]  # fmt: skip
    if not P:
        return means
    tokens = P + sum(part.shape[1] * part.shape[2] for part in parts)
    everything = first + sum((total.sum(1, keepdim=True) for total in sums), torch.zeros_like(first))
    return [*means, everything / tokens]


def _positional_terms(parts: list[Tensor], prefix: Tensor, p: Params, s: Context) -> list[Tensor | None]:
    """sum_j p_ij k_j inside each region, (B, regions, n, C) per group, and for the prefix over the image."""
    if s.geo.sides is None:
        return [None] * len(parts)
    P = s.geo.prefix
    terms: list[Tensor | None] = []
    for group, k in zip(groups(s.geo.support, s.geo.grid), parts, strict=False):
        region, group = k.flatten(0, 1), group.in_steps(s.geo.steps)
        if group.contiguous:
            term = dense(region, p["table.weight"], group.sides)
        else:
            term = multiply(region_matrix(p, group.offsets, 0, s.geo.device).to(k.dtype), region)
        terms.append(term.view_as(k))
    if not P:
        return terms
    entries = p["table.prefix"].repeat_interleave(s.dim // s.heads, 0).to(prefix.dtype)
    first = prefix.sum(1)[:, None, None]  # (B, 1, 1, C)
    on_grid = sum((k.sum((1, 2))[:, None, None] for k in parts[:-1]), torch.zeros_like(first))
    terms = [None if term is None else term + first * entries[:, 1] for term in terms]
    return [*terms, (on_grid * entries[:, 0] + first * entries[:, 2]).expand(-1, -1, P, -1)]


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: what `needs_regions` says."""
    return needs_regions(s)


def needs_regions(s: Context) -> Reason:
    """Why a path by regions does not support the context: supports without regions, statistics across regions, patches
    of one-step kernels."""
    if not has_regions(s.geo.support, s.geo.grid):
        return f"support={s.geo.support} has no regions"
    if s.mask is not None:
        return "an attn_mask hides kernels inside a region"
    if isinstance(s.spec.position, Rope):
        return f"position={s.spec.position} rotates tokens in the order of the grid"
    if not isinstance(s.spec.kernel, TwoStep) and s.spec.size > 1:
        return f"a one-step kernel of size {s.spec.size} crosses the regions"
    if s.geo.prefix and any(step.axis == "positions" for step in s.spec.activation):
        return "@positions runs over the queries of every region, because all of them see the prefix"
    if s.training and any(step.name == "batchnorm" for step in s.spec.activation):
        return "batchnorm has one set of statistics over all regions in training"
    return None


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred always."""
    return "regions are small images of their own: no N x N tensor"


def softmax_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: what windows or `sdpa` do not support."""
    return first(sdpa.unsupported(s, call, m), unsupported(s, call, m))


def softmax_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred except under transforms, as `sdpa`."""
    return None if call.transformed else "regions are small images of their own, and softmax is fused"


SOFTMAX = MixerPath("windows_sdpa", mixer(softmax), softmax_unsupported, softmax_preferred)
PATH = MixerPath("windows", mixer(products), unsupported, preferred)
