"""Numbers per layer and head: how many kernels a position selects, how far they are, and what selects them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.explanation.layer import CHUNK, LayerMaps
from kernelbank.spec import TwoStep
from kernelbank.spec.inventory import Grid
from kernelbank.text import columns

FAINT = 0.01
"""A weight is faint below this share of the largest one of its position."""
TITLES = {
    "effective": "effective number", "seen": "kernels seen", "sparsity": "sparsity", "distance": "mean distance",
    "static_share": "static share", "rank_correlation": "rank correlation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeadStatistics:
    """Statistics of one head of a layer, means over images and positions of the grid. None where a quantity has no
    meaning for the mixer.

    With b_ij = |a_ij| / sum_j |a_ij|, a the map of a two_step mixer, the effective spatial kernel of a depth-wise one,
    or the taps of a static or generated one-step kernel (their absolute values summed over the channels of the head):

    Attributes:
        effective: exp(-sum_j b_ij log b_ij), the effective number of kernels or taps: n if all weigh the same, 1 if
            one is selected. Signs do not count, and a position without any weight counts 0.
        seen: n_i, the number of kernels that a position sees, or of taps.
        sparsity: The share of the kernels seen with |a_ij| <= 0.01 max_j |a_ij|.
        distance: sum_j b_ij |i - j| over kernels on the grid, in cells (Euclidean; a strided kernel lies at the centre
            of its cell).
        static_share: The share of the positional part. In a two_step mixer it is the variance over kernels of p_ij,
            divided by those of p_ij and of q_i . k_j together: what tells kernels apart. In a depth-wise mixer it is
            the energy of sum_j p_ij k_j in the output, divided by those of both terms. 0 without a relative position.
        rank_correlation: Spearman's rank correlation over the kernels seen between a_ij and the cosine similarity of
            query and key. Equal values have their mean rank.
    """

    layer: str
    head: int
    effective: float | None = None
    seen: float | None = None
    sparsity: float | None = None
    distance: float | None = None
    static_share: float | None = None
    rank_correlation: float | None = None

    @property
    def dynamic_share(self) -> float | None:
        """1 - static_share."""
        return None if self.static_share is None else 1 - self.static_share


def statistics(layers: Iterable[LayerMaps]) -> list[HeadStatistics]:
    """Return the statistics of every head of every layer, in order."""
    return [head for layer in layers for head in _of_layer(layer)]


def _of_layer(layer: LayerMaps) -> list[HeadStatistics]:
    on_grid = [place for place, token in enumerate(layer.positions) if token >= layer.prefix]
    rows = on_grid or list(range(len(layer.positions)))
    found: dict[str, Tensor] = {}
    if (map_ := _map(layer)) is not None:
        found = _of_map(layer, map_, rows)
    elif layer.kernels is not None and layer.spec.size > 1:
        found = _of_taps(layer, rows)
    if (share := _static_share(layer, rows)) is not None:
        found["static_share"] = share
    return [
        HeadStatistics(layer=layer.name, head=head, **{name: float(values[place]) for name, values in found.items()})
        for place, head in enumerate(layer.heads)
    ]


def _map(layer: LayerMaps) -> Tensor | None:
    """The weights that kernels of the bank have, (B, h, T, m): of a one-step mixer only with a positional part."""
    if isinstance(layer.spec.kernel, TwoStep):
        return None if layer.weights is None else layer.weights.values
    if layer.static is None or layer.effective is None:
        return None
    return layer.effective.values


def _of_map(layer: LayerMaps, map_: Tensor, rows: list[int]) -> dict[str, Tensor]:
    """Means over images and `rows`, computed in chunks of positions."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(rows), CHUNK):
        chosen = rows[start : start + CHUNK]
        a = map_[:, :, chosen]
        visible = torch.ones_like(a[:1, :1], dtype=torch.bool) if layer.visible is None \
            else layer.visible[:, None, chosen]  # fmt: skip
        for name, values in _of_rows(layer, a, visible, chosen).items():
            sums[name] = sums.get(name, 0) + values.sum((0, 2))
    return {name: total / (len(map_) * len(rows)) for name, total in sums.items()}


def _of_rows(layer: LayerMaps, a: Tensor, visible: Tensor, rows: list[int]) -> dict[str, Tensor]:
    """Statistics of some positions, each (B, h, rows)."""
    size = torch.where(visible, a.abs(), 0)
    faint = (size <= FAINT * size.amax(-1, keepdim=True)) & visible
    seen = visible.sum(-1).expand(a.shape[:-1])
    result = {
        "effective": effective_number(size), "seen": seen.to(a.dtype),
        "sparsity": faint.sum(-1) / seen.clamp(min=1),
    }  # fmt: skip
    if layer.origin is not None:
        result["distance"] = _distance(layer, size, rows)
    if layer.queries is not None and layer.keys is not None:
        result["rank_correlation"] = rank_correlation(a, _cosine(layer, rows), visible)
    return result


def effective_number(weights: Tensor) -> Tensor:
    """exp of the entropy of non-negative weights, normalised over the last axis; 0 where all are zero."""
    total = weights.sum(-1, keepdim=True)
    b = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(b).sum(-1).exp(), 0)


def _distance(layer: LayerMaps, size: Tensor, rows: list[int]) -> Tensor:
    """sum_j b_ij |i - j| over kernels on the grid."""
    assert layer.origin is not None
    spread = size
    if layer.mixing is not None:  # the learned mixtures have no place: their kernels have
        spread = size @ layer.mixing.values.abs().mT.to(size.dtype)
    kernels = layer.tokens if layer.index is None else layer.tokens[rows]
    tokens = torch.tensor([layer.positions[row] for row in rows], device=size.device)[:, None]
    centre = _centre(kernels - layer.prefix, layer.grid, layer.stride)
    at = _centre(tokens - layer.prefix, layer.grid, 1)
    far = ((at[0] - centre[0]) ** 2 + (at[1] - centre[1]) ** 2).sqrt()
    weights = torch.where((kernels >= layer.prefix) & (tokens >= layer.prefix), spread, 0)
    return (weights * far).sum(-1) / weights.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)


def _centre(cells: Tensor, grid: Grid, stride: int) -> tuple[Tensor, Tensor]:
    """Row and column of the centre of `stride` x `stride` positions from a cell of the grid on, cut at its end."""
    height, width = grid
    y, x = (cells // width).double(), (cells % width).double()
    return y + ((height - y).clamp(max=stride) - 1) / 2, x + ((width - x).clamp(max=stride) - 1) / 2


def _cosine(layer: LayerMaps, rows: list[int]) -> Tensor:
    """The cosine similarity of queries and the keys on the kernel axis, (B, h, rows, m)."""
    assert layer.queries is not None and layer.keys is not None
    q = F.normalize(layer.queries.values[:, :, rows], dim=-1)
    k = F.normalize(layer.keys.values, dim=-1)
    if layer.index is None:
        return q @ k.mT
    chosen = k[:, :, layer.index.values[rows].clamp(min=0)]
    return (chosen @ q[..., None]).squeeze(-1)


def rank_correlation(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """Spearman's rank correlation over the last axis, among visible entries; 0 where one of them is constant."""
    visible = visible.expand(torch.broadcast_shapes(a.shape, b.shape, visible.shape))
    ranks = []
    for values in (a, b):
        r = torch.where(visible, mean_ranks(torch.where(visible, values, torch.inf)), 0)
        r = torch.where(visible, r - r.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1), 0)
        ranks.append(r)
    x, y = ranks
    norm = ((x**2).sum(-1) * (y**2).sum(-1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(-1) / norm.clamp(min=1e-12), 0)


def mean_ranks(values: Tensor) -> Tensor:
    """The ranks over the last axis from 0, equal values with their mean rank."""
    values = values.contiguous()
    ordered = values.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - 1).double() / 2


def _of_taps(layer: LayerMaps, rows: list[int]) -> dict[str, Tensor]:
    """Statistics of the taps of one-step kernels, (h) each."""
    assert layer.kernels is not None
    taps = head_taps(layer, signed=False)  # (B, P, h, t)
    if taps.shape[1] > 1:
        taps = taps[:, rows]
    size = layer.spec.size
    at = torch.arange(size, device=taps.device, dtype=taps.dtype) - size // 2
    far = (at[:, None] ** 2 + at[None] ** 2).sqrt().flatten()
    total = taps.sum(-1).clamp(min=torch.finfo(taps.dtype).tiny)
    faint = taps <= FAINT * taps.amax(-1, keepdim=True)
    values = {
        "effective": effective_number(taps), "seen": torch.full_like(total, size * size),
        "sparsity": faint.to(taps.dtype).mean(-1), "distance": (taps * far).sum(-1) / total,
    }  # fmt: skip
    return {name: value.mean((0, 1))[list(layer.heads)] for name, value in values.items()}


def head_taps(layer: LayerMaps, signed: bool = True) -> Tensor:
    """The taps of one-step kernels averaged over the channels of each head, (B, P, h, t), or their absolute values."""
    assert layer.kernels is not None
    kernels = layer.kernels.values.flatten(-2)
    kernels = kernels if signed else kernels.abs()
    if layer.kernels.axes[1] == "output":  # the channels of a head are outputs
        kernels = kernels.mean(2)[:, None]
    channels = layer.operand.values.shape[-1]
    whole = kernels.repeat_interleave(channels // kernels.shape[2], 2)
    return whole.unflatten(2, (layer.num_heads, -1)).mean(3)


def _static_share(layer: LayerMaps, rows: list[int]) -> Tensor | None:
    """The share of the positional part per head; None for kernels without a dynamic part."""
    if layer.dynamic is None:
        return None
    device = layer.operand.values.device
    if layer.static is None:
        return torch.zeros(len(layer.heads), device=device)
    if not isinstance(layer.spec.kernel, TwoStep):
        positional = layer.weighed(layer.positional())[:, :, rows]
        gated = layer.convolved()[:, :, rows]
        p, d = ((part**2).mean((0, 2, 3)) for part in (positional, gated))
        return p / (p + d).clamp(min=1e-30)
    assert layer.scores is not None
    visible = layer.visible[:, None, rows] if layer.visible is not None else None
    p = _variance(layer.static.values[None][:, :, rows], visible)
    d = _variance(layer.scores.values[:, :, rows], visible)
    return (p / (p + d).clamp(min=1e-30)).mean((0, 2))


def _variance(values: Tensor, visible: Tensor | None) -> Tensor:
    """The variance over the kernels seen, (B, h, T)."""
    if visible is None:
        return values.var(-1, unbiased=False)
    n = visible.sum(-1).clamp(min=1)
    mean = torch.where(visible, values, 0).sum(-1) / n
    return torch.where(visible, (values - mean[..., None]) ** 2, 0).sum(-1) / n


# ---- text ------------------------------------------------------------------------------------------------


def table(heads: list[HeadStatistics]) -> str:
    """A row per layer: the mean over its heads."""
    rows = [("layer", "heads", *TITLES.values())]
    for layer in dict.fromkeys(head.layer for head in heads):
        own = [head for head in heads if head.layer == layer]
        cells = [mean(own, name) for name in TITLES]
        rows.append((layer, str(len(own)), *("-" if cell is None else f"{cell:.3g}" for cell in cells)))
    return columns(rows)


def mean(heads: list[HeadStatistics], name: str) -> float | None:
    """The mean of a statistic over heads; None where they have none."""
    values = [value for head in heads if (value := getattr(head, name)) is not None]
    return sum(values) / len(values) if values else None


def documents(heads: list[HeadStatistics]) -> list[dict[str, Any]]:
    """The statistics as JSON values."""
    return [asdict(head) | {"dynamic_share": head.dynamic_share} for head in heads]
