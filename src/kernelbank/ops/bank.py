"""The bank axis: where kernels come from. Dynamic banks are generated at positions of the image, static banks are
parameters, `box` has none."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.context import Context, Params
from kernelbank.ops.frame import batch_norm, linear, linear_dtype
from kernelbank.ops.geometry import pool_cells
from kernelbank.ops.normed import head_norm
from kernelbank.ops.rotation import rotate
from kernelbank.spec import Dynamic

SQUASH = {"identity": lambda w: w, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


class TwoStepBank(NamedTuple):
    """Kernels C_in -> 1 and 1 -> C_out: key (B or 1, h, n, d*t), value (B or 1, h, n, d); `key_bias`
    (h, 1, n) and `value_bias` (C) of a static bank in a bare frame; `scale` of the scores."""

    key: Tensor
    value: Tensor
    scale: float
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None


def generate_taps(features_BnC: Tensor, p: Params, s: Context) -> tuple[Tensor, Tensor]:
    """(taps (B, n, R*t), hidden (B, n, C or C/r)): the key weights of a dynamic bank, and the features that they are
    computed from."""
    assert isinstance(s.spec.bank, Dynamic)
    hidden = features_BnC
    if s.spec.bank.r is not None:
        hidden = linear(hidden, p, "reduce", s)
        if s.spec.frame == "bn_relu":
            hidden = batch_norm(hidden, p, "reduce_norm", s.training)
        hidden = F.relu(hidden)
    return SQUASH[s.spec.bank.squash](linear(hidden, p, "key", s)), hidden


def generator_dtype(p: Params, s: Context) -> torch.dtype:
    """The dtype of the features that a dynamic bank is generated from, outside autocast."""
    assert isinstance(s.spec.bank, Dynamic)
    return linear_dtype(p, "key" if s.spec.bank.r is None else "reduce", s)


def two_step_bank(source_BTC: Tensor, p: Params, s: Context) -> TwoStepBank:
    """The kernels of a two_step spec, before `project` mixes them."""
    h, d = s.heads, s.dim // s.heads
    if not isinstance(s.spec.bank, Dynamic):  # in one head of size 1 the kernels are the weights of two nn.Linears
        key, bias = p["key.weight"].reshape(h, -1, d * s.spec.size**2), p.get("key.bias")
        value = p["value.weight"].reshape(h, d, -1).mT
        bias = None if bias is None else bias.reshape(h, 1, -1)
        return TwoStepBank(key[None], value[None], 1.0, bias, p.get("value.bias"))
    cells = pool_cells(source_BTC, s.spec.bank.stride, s.geo)
    taps, hidden = generate_taps(cells, p, s)
    value = SQUASH[s.spec.bank.squash](linear(hidden, p, "value", s))
    taps = taps.unflatten(-1, (h, d, -1))  # (B, n, h, d, t)
    taps = rotate(head_norm(taps.transpose(-1, -2), p, "k_norm", s), s).transpose(-1, -2)
    return TwoStepBank(taps.flatten(3).transpose(1, 2), value.unflatten(-1, (h, d)).transpose(1, 2), d**-0.5)


def box(x_map: Tensor, size: int) -> Tensor:
    """The mean of the taps inside the grid minus the centre, (B, C, H, W); PoolFormer, arXiv 2111.11418."""
    return F.avg_pool2d(x_map, size, 1, size // 2, count_include_pad=False) - x_map
