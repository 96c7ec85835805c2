"""`LayerMaps`: which kernels every position of a layer selects, and what its effective kernel is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelbank.explanation.named import NamedTensor
from kernelbank.ops.geometry import Geometry, unfold
from kernelbank.spec import Dynamic, Full, MixerSpec, TwoStep

MAP = ("image", "head", "position", "kernel")
CHUNK = 512
"""How many positions are computed at once where every position has kernels of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerMaps:
    """The maps and kernels of one mixer on some images, for its `heads` and `positions`.

    Position and kernel axes count tokens, prefix first and then the grid row by row. With windows or neighbourhoods the
    kernel axis of the maps runs over the kernels that each position sees, and `index` says which they are.

    Attributes:
        name: The mixer's name in the model.
        spec: The mixer.
        grid: (H, W), the positions.
        prefix: The number of tokens before the grid.
        geometry: The geometry that the mixer runs on, with the padded grid of a published checkpoint.
        heads: The heads that were asked for.
        positions: The positions that were asked for, as token numbers.
        operand: What the dynamic convolution is applied to, (image, position, channel), every token.
        rows: The token of the operand at each of `positions`; they differ on a padded grid alone.
        bias: What the dynamic convolution adds, (image, channel), or None.
        weights: The weights with which positions select kernels, (image, head, position, kernel): a_ij of a two_step
            mixer, 1/n_i of a one-step mixer that averages a generated bank (one head, one image). None without
            selection: static kernels and `box`.
        scores: The dynamic part of a two_step map before its activation, scale q_i . k_j, with the shape of `weights`.
        gate: The dynamic part of a depth-wise kernel of size 1: the operand q_i averaged over the channels of a head,
            (image, head, position).
        static: The positional part p_ij, (head, position, kernel), zero where the spec does not see a kernel. In a
            two_step mixer it is added to the scores, in a depth-wise one to the kernel. None without relative position.
        table: The relative table that `static` is read from, (head, row offset, column offset).
        prefix_table: The entries of the relative table for the prefix, (head, 3): prefix to grid, grid to prefix,
            prefix to prefix.
        index: The kernel in the bank of each entry of the kernel axis, (position, kernel), -1 where there is none.
            None where the kernel axis is the bank.
        mask: Which kernels of the bank a position sees of an image, (image, position, kernel), where the mixer was
            given a mask; None elsewhere.
        origin: The token at which each kernel of the bank was generated, -1 in padding; with a stride the first token
            of the cell. None for static banks.
        regions: The smallest rectangle that a position sees, (position, 4): top, left, bottom, right, the last two
            exclusive. None where every position sees the whole grid.
        mixing: The learned combinations of `project`, (kernel, mixture). None for other mixes.
        values: The second kernels v_j of a two_step mixer, or the kernels k_j that the positional part of a depth-wise
            mixer weighs, (image, head, kernel, channel).
        queries: The patches of the operand that meet the kernels, (image, head, position, channel), two_step alone.
        keys: The first kernels k_j, (image, head, kernel, channel), two_step alone.
        coefficients: The predicted coefficients of a static bank, (image, kernel).
        kernels: The kernels of a one-step mixer: (image, position, group, row, column), one position where all share
            them; (image, output, input, row, column) of a full kernel.
    """

    name: str
    spec: MixerSpec
    grid: tuple[int, int]
    prefix: int
    geometry: Geometry
    num_heads: int
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    operand: NamedTensor
    rows: Tensor
    bias: NamedTensor | None = None
    weights: NamedTensor | None = None
    scores: NamedTensor | None = None
    gate: NamedTensor | None = None
    static: NamedTensor | None = None
    table: NamedTensor | None = None
    prefix_table: NamedTensor | None = None
    index: NamedTensor | None = None
    mask: NamedTensor | None = None
    origin: NamedTensor | None = None
    regions: NamedTensor | None = None
    mixing: NamedTensor | None = None
    values: NamedTensor | None = None
    queries: NamedTensor | None = None
    keys: NamedTensor | None = None
    coefficients: NamedTensor | None = None
    kernels: NamedTensor | None = None

    @property
    def dynamic(self) -> NamedTensor | None:
        """The dynamic part of the map, (image, head, position, kernel): the scores of a two_step mixer, or q_i / n_i of
        a depth-wise one, q_i averaged over the channels of a head. None for other kernels."""
        if self.scores is not None or self.gate is None or self.weights is None:
            return self.scores
        return NamedTensor(self.gate.values[..., None] * self.weights.values, MAP)

    @property
    def effective(self) -> NamedTensor | None:
        """The effective spatial kernel, (image, head, position, kernel): the weight of every kernel of the image at a
        position. It is the map of a two_step mixer, with `project` carried back to the kernels that were mixed, and the
        sum of the dynamic and the static part of a depth-wise one. None for other kernels."""
        if self.weights is not None and isinstance(self.spec.kernel, TwoStep):
            if self.mixing is None:
                return self.weights
            return NamedTensor(self.weights.values @ self.mixing.values.mT, MAP)
        dynamic = self.dynamic
        if dynamic is None or self.static is None:
            return dynamic
        return NamedTensor(dynamic.values + self.positional(), MAP)

    @property
    def visible(self) -> Tensor | None:
        """(image or 1, position, kernel): whether a position sees an entry of the kernel axis; None where all of them
        are seen."""
        if self.mask is not None:
            return self.mask.values
        return None if self.index is None else self.index.values[None] >= 0

    @property
    def tokens(self) -> Tensor:
        """(position, kernel): the token at which each entry of the kernel axis was generated, -1 where there is none.
        One row where every position sees the whole bank. For generated banks alone."""
        assert self.origin is not None
        if self.index is None:
            return self.origin.values[None]
        return torch.where(self.index.values >= 0, self.origin.values[self.index.values.clamp(min=0)], -1)

    @property
    def stride(self) -> int:
        """How many positions along an axis share a kernel of the bank."""
        return self.spec.bank.stride if isinstance(self.spec.bank, Dynamic) else 1

    def output(self) -> NamedTensor:
        """Apply the maps and kernels by the definition: the mixer's output before its last linear layer, for `heads`
        and `positions`, (image, head, position, channel)."""
        if isinstance(self.spec.kernel, TwoStep):
            assert self.weights is not None
            o = self.weighed(self.weights.values)
        else:
            o = self.convolved()
            if self.static is not None:
                o = o + self.weighed(self.positional())
        if self.bias is not None:
            o = o + self.bias.values.unflatten(-1, (self.num_heads, -1))[:, list(self.heads), None]
        return NamedTensor(o, ("image", "head", "position", "channel"))

    def positional(self) -> Tensor:
        """p_ij where the kernel is seen, else 0, (B or 1, h, T, m)."""
        assert self.static is not None
        static = self.static.values[None]
        return static if self.mask is None else torch.where(self.mask.values[:, None], static, 0)

    def weighed(self, weights_BhTm: Tensor) -> Tensor:
        """sum_j w_ij v_j for weights on the kernel axis, (B, h, T, d)."""
        assert self.values is not None
        values = self.values.values
        if self.index is None:
            return weights_BhTm.to(values.dtype) @ values
        parts = []
        for rows in self._chunks():
            chosen = values[:, :, self.index.values[rows].clamp(min=0)]  # (B, h, rows, m, d)
            parts.append((weights_BhTm[:, :, rows, None].to(values.dtype) @ chosen).squeeze(-2))
        return torch.cat(parts, 2)

    def convolved(self) -> Tensor:
        """sum_t w_it x_{i+t}, the kernels of a one-step mixer applied to the operand, (B, h, T, d)."""
        assert self.kernels is not None
        kernels = self.kernels.values.flatten(-2)
        patches = unfold(self.operand.values, self.spec.size, self.geometry)[:, self.rows]  # (B, T, C, t)
        channels = patches.shape[2]
        if isinstance(self.spec.kernel, Full):  # kernels (B or 1, O, C/g, t)
            groups = channels // kernels.shape[2]
            parted = patches.unflatten(2, (groups, -1))
            whole = kernels.unflatten(1, (groups, -1)).expand(len(patches), -1, -1, -1, -1)
            o = torch.einsum("bgoct,bTgct->bTgo", whole, parted).flatten(2)
        else:
            o = (kernels.repeat_interleave(channels // kernels.shape[2], 2) * patches).sum(-1)
        return o.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)[:, list(self.heads)]

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.positions), CHUNK):
            yield slice(start, start + CHUNK)

    def __repr__(self) -> str:
        parts = [name for name in ("weights", "static", "coefficients", "kernels") if getattr(self, name) is not None]
        return f"LayerMaps({self.name!r}, {str(self.spec)!r}, grid={self.grid}, {', '.join(parts)})"
