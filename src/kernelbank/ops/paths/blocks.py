"""Windows as blocks of the grid, for compilers and exporters: reshapes and a roll in place of an order of tokens. A
rolled block may hold parts of several regions, and a constant mask keeps them apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.bank import TwoStepBank, generate_taps, generator_dtype, two_step_bank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import Geometry, cached, crop, pad_tokens
from kernelbank.ops.kernel import gate, queries, weigh
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import sdpa
from kernelbank.ops.paths.path import MixerPath, Reason
from kernelbank.ops.paths.windows import needs_regions
from kernelbank.ops.position import region_matrix
from kernelbank.ops.precision import full_precision, wide
from kernelbank.spec import Pool, TwoStep, Window
from kernelbank.spec.inventory import Grid
from kernelbank.spec.support import seen

# Shapes: a grid of c blocks of n cells each and P prefix tokens; L = c n + P tokens in block order, prefix last.


class Blocks:
    """The blocks of a grid under a window support: M x M, rolled by the shift so that whole regions lie in one block,
    and padded to whole blocks where M does not divide a side."""

    def __init__(self, geo: Geometry) -> None:
        assert isinstance(geo.support, Window)
        window, (height, width) = geo.support, geo.grid
        self.geo, self.window = geo, window
        self.sides = min(window.M, height), min(window.M, width)
        self.rolls = _roll(window, height), _roll(window, width)
        self.counts = -(-height // self.sides[0]), -(-width // self.sides[1])
        self.pads = self.counts[0] * self.sides[0] - height, self.counts[1] * self.sides[1] - width

    @property
    def cells(self) -> int:
        """n, the cells of a block."""
        return math.prod(self.sides)

    def split(self, x_BTX: Tensor) -> Tensor:
        """Tokens in block order, prefix last: (B, T, X) -> (B, L, X). Cells of the padding are zero."""
        P, X = self.geo.prefix, x_BTX.shape[-1]
        x = (x_BTX[:, P:] if P else x_BTX).unflatten(1, self.geo.grid)
        if any(self.pads):
            x = F.pad(x, (0, 0, 0, self.pads[1], 0, self.pads[0]))
        if any(self.rolls):
            x = x.roll((-self.rolls[0], -self.rolls[1]), (1, 2))
        (rows, columns), (height, width) = self.counts, self.sides
        x = x.view(-1, rows, height, columns, width, X).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, rows * columns * self.cells, X)
        return torch.cat([x, x_BTX[:, :P]], 1) if P else x

    def join(self, x_BLX: Tensor) -> Tensor:
        """The inverse of `split`, (B, L, X) -> (B, T, X)."""
        cells, prefix = self.parts(x_BLX)
        (rows, columns), (height, width), X = self.counts, self.sides, x_BLX.shape[-1]
        x = cells.reshape(-1, rows, columns, height, width, X).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, rows * height, columns * width, X)
        if any(self.rolls):
            x = x.roll(self.rolls, (1, 2))
        if any(self.pads):
            x = x[:, : self.geo.grid[0], : self.geo.grid[1]]
        x = x.flatten(1, 2)
        return torch.cat([prefix, x], 1) if self.geo.prefix else x

    def parts(self, x_BLX: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks (B, c, n, ...) and the prefix (B, P, ...) of tokens in block order."""
        total = math.prod(self.counts) * self.cells
        cells = x_BLX[:, :total] if self.geo.prefix else x_BLX
        return cells.unflatten(1, (-1, self.cells)), x_BLX[:, total:]

    @property
    def visible(self) -> Tensor | None:
        """(c, n, n), which cells of a block see each other; None where every block is one region."""
        if not any(self.rolls) and not any(self.pads) and self.window.pad != "timm":
            return None
        return cached(visibility, self.window, self.geo.grid, self.geo.device)


def _roll(window: Window, length: int) -> int:
    """By how many cells an axis is rolled: the shift. With ``pad=timm`` the tokens are rolled already."""
    return window.resolved_shift if length > window.M and window.pad != "timm" else 0


def visibility(window: Window, grid: Grid, device: torch.device | None = None) -> Tensor:
    """(c, n, n): whether cells of a block are of the same region, blocks row by row. Padding sees padding."""
    rows, columns = (_axis_visibility(window, length, device) for length in grid)
    both = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return both.flatten(0, 1).flatten(1, 2).flatten(2, 3)


def _axis_visibility(window: Window, length: int, device: torch.device | None) -> Tensor:
    """(blocks, M, M) along one axis."""
    side = min(window.M, length)
    regions = [region[0] for region in seen(window, length)]
    regions += [-1] * (-length % side)
    roll = _roll(window, length)
    at = torch.tensor(regions[roll:] + regions[:roll], device=device).view(-1, side)
    return at[:, :, None] == at[:, None, :]


# ---- the mixer -------------------------------------------------------------------------------------------


def run(x_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The mixer block by block."""
    x_BTC = pad_tokens(x_BTC, s.geo)
    blocks = Blocks(s.geo)
    if s.spec.size > 1 or any(blocks.pads):  # patches cross the blocks, and padding needs no linear layers
        operand, source = enter(x_BTC, p, s)
        o = blocks.join(_core(operand, source, p, s, blocks, blocks.split))
        return crop(leave(o, p, s), s.geo)
    operand, source = enter(blocks.split(x_BTC), p, s)
    o = _core(operand, source, p, s, blocks, lambda tokens: tokens)
    return crop(blocks.join(leave(o, p, s)), s.geo)


def _core(
    operand: Tensor, source: Tensor, p: Params, s: Context, blocks: Blocks, split: Callable[[Tensor], Tensor]
) -> Tensor:
    """The dynamic convolutions, (B, L, C); `split` puts the tokens in block order."""
    if not isinstance(s.spec.kernel, TwoStep):
        return _one_step(split(operand), split(source), p, s, blocks).to(operand.dtype)
    q = split(queries(operand, p, s).transpose(1, 2).flatten(2)).unflatten(2, (s.heads, -1))
    return _two_step(q, split(source), p, s, blocks)


def _two_step(q_BLhe: Tensor, source_BLC: Tensor, p: Params, s: Context, blocks: Blocks) -> Tensor:
    """Every block with its own kernels and those of the prefix, then the prefix with all kernels, (B, L, C)."""
    bank, P = two_step_bank(source_BLC, p, s), s.geo.prefix
    key_BLhe, value_BLhd = (t.transpose(1, 2) for t in (bank.key, bank.value))
    (q, q_prefix), (k, k_prefix), (v, v_prefix) = map(blocks.parts, (q_BLhe, key_BLhe, value_BLhd))
    visible = blocks.visible
    if P:
        k, v = (
            torch.cat([first[:, None].expand(-1, t.shape[1], -1, -1, -1), t], 2)
            for first, t in ((k_prefix, k), (v_prefix, v))
        )
        visible = None if visible is None else F.pad(visible, (P, 0), value=True)
    o = _attend(q, k, v, bank, _added(p, s, blocks), visible, p, s).flatten(1, 2)
    if not P:
        return o
    everything = (blocks.join(t.flatten(2)).unflatten(2, (s.heads, -1)) for t in (key_BLhe, value_BLhd))
    k, v = (t[:, None] for t in everything)
    return torch.cat([o, _attend(q_prefix[:, None], k, v, bank, _added_to_prefix(p, s), None, p, s)[:, 0]], 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bank: TwoStepBank, added: Tensor | None, visible: Tensor | None, p: Params,
    s: Context,
) -> Tensor:  # fmt: skip
    """phi(scale q k^T + added) v inside each block, (B, c, n, h, .) -> (B, c, n, C). `added` (h, n, m) and `visible`
    (c, n, m) are those of all images."""
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))
    visible = None if visible is None else visible[:, None]
    x = sdpa.temperature(s.spec.activation)
    if x is None:
        a = weigh(s.product(q * bank.scale, k.mT), added, visible, p, s)
    else:
        scores = s.product(q * (bank.scale * x), k.mT)
        a = F.dropout(_softmax(scores, added, visible, x), s.attn_drop, s.training)
    return s.product(a.to(v.dtype), v).transpose(2, 3).flatten(3)


def _softmax(scores: Tensor, added: Tensor | None, visible: Tensor | None, x: float) -> Tensor:
    """softmax(scores + x added) over what is visible."""
    mask = None if added is None else (added * x).to(scores.dtype)
    if visible is not None:
        hidden = torch.where(visible, 0.0, -torch.inf).to(scores.dtype)
        mask = hidden if mask is None else mask + hidden
    return torch.softmax(scores if mask is None else scores + mask, -1)


def _added(p: Params, s: Context, blocks: Blocks) -> Tensor | None:
    """The relative position of a block's queries to the prefix's kernels and its own, (h, n, P + n)."""
    if s.geo.sides is None:
        return None
    offsets = tuple(range(blocks.sides[0])), tuple(range(blocks.sides[1]))
    added = region_matrix(p, offsets, s.geo.prefix, s.geo.device)
    return added[:, s.geo.prefix :] if s.geo.prefix else added


def _added_to_prefix(p: Params, s: Context) -> Tensor | None:
    """The relative position of the prefix to every kernel, (h, P, T)."""
    if s.geo.sides is None:
        return None
    P, entries = s.geo.prefix, p["table.prefix"][:, None]
    return torch.cat([entries[..., 2:].expand(-1, P, P), entries[..., :1].expand(-1, P, s.geo.tokens - P)], 2)


def _one_step(operand_BLC: Tensor, source_BLC: Tensor, p: Params, s: Context, blocks: Blocks) -> Tensor:
    """A gate per region, which is the mean of its kernels, and the positional term inside it."""
    P, visible = s.geo.prefix, blocks.visible
    with full_precision(source_BLC):
        features = source_BLC.to(generator_dtype(p, s))
        pooled = isinstance(s.spec.mix, Pool)
        averaged = features if pooled else generate_taps(features, p, s)[0]
        k, k_prefix = blocks.parts(averaged.to(wide(averaged.dtype)))
        mean, mean_prefix = _means(k, k_prefix, visible, blocks)
        if pooled:
            rows = mean.flatten(1, 2)
            taps = generate_taps(torch.cat([rows, mean_prefix], 1).to(features.dtype), p, s)[0]
            mean, mean_prefix = taps[:, : rows.shape[1]].unflatten(1, mean.shape[1:3]), taps[:, rows.shape[1] :]
    q, q_prefix = blocks.parts(operand_BLC)
    term, term_prefix = _positional_terms(k, k_prefix, visible, p, s, blocks)
    o = gate(q, mean[..., None], term).to(q.dtype).flatten(1, 2)
    if P:
        o = torch.cat([o, gate(q_prefix, mean_prefix[..., None], term_prefix).to(q.dtype)], 1)
    return o + p["bias"] if "bias" in p else o


def _means(k: Tensor, k_prefix: Tensor, visible: Tensor | None, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The mean of the kernels that each cell of a block sees, (B, c, 1 or n, X), and that of the prefix, (B, 1, X)."""
    P, first = k_prefix.shape[1], k_prefix.sum(1, keepdim=True)
    if visible is None:
        means = (k.sum(2, keepdim=True) + first[:, None]) / (blocks.cells + P) if P else k.mean(2, keepdim=True)
    else:
        weights = visible.to(k.dtype) / (visible.sum(-1, keepdim=True) + P).to(k.dtype)
        means = weights @ k
        means = means + first[:, None] / (visible.sum(-1, keepdim=True) + P).to(k.dtype) if P else means
    if not P:
        return means, first
    return means, (_grid_sum(k, blocks) + first) / blocks.geo.tokens


def _grid_sum(k: Tensor, blocks: Blocks) -> Tensor:
    """The sum over all cells of the grid, without the padding, (B, 1, X)."""
    if not any(blocks.pads):
        return k.sum((1, 2))[:, None]
    geo = replace(blocks.geo, prefix=0)
    return Blocks(geo).join(k.flatten(1, 2)).sum(1, keepdim=True)


def _positional_terms(
    k: Tensor, k_prefix: Tensor, visible: Tensor | None, p: Params, s: Context, blocks: Blocks
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """sum_j p_ij k_j inside each region, (B, c, n, C), and for the prefix over the image, (B, P, C)."""
    if s.geo.sides is None:
        return None, None
    offsets = tuple(range(blocks.sides[0])), tuple(range(blocks.sides[1]))
    matrix = region_matrix(p, offsets, 0, s.geo.device).to(k.dtype)  # (h, n, n)
    if visible is not None:
        matrix = torch.where(visible[:, None], matrix, 0)
    term = (matrix @ k.unflatten(-1, (s.heads, -1)).transpose(2, 3)).transpose(2, 3).flatten(3)
    if not s.geo.prefix:
        return term, None
    entries = p["table.prefix"].repeat_interleave(s.dim // s.heads, 0).to(k.dtype)
    first = k_prefix.sum(1, keepdim=True)
    over = _grid_sum(k, blocks) * entries[:, 0] + first * entries[:, 2]
    return term + first[:, None] * entries[:, 1], over.expand(-1, s.geo.prefix, -1)


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: what `needs_blocks` says."""
    return needs_blocks(s)


def needs_blocks(s: Context) -> Reason:
    """Why a path by blocks does not support the context: a support that is no window, padding that would be counted,
    and what paths by regions do not support."""
    if not isinstance(s.geo.support, Window):
        return f"support={s.geo.support} is no window"
    if s.training and s.spec.frame == "bn_relu" and any(Blocks(s.geo).pads):
        return "BatchNorm would count the padding of the blocks in training"
    return needs_regions(s)


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """In graphs."""
    return "compilers and exporters see through reshapes" if call.compiling else None


PATH = MixerPath("blocks", run, unsupported, preferred)
