"""The position axis: the relative table as a T x T matrix a head."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelbank.ops.setting import Params, Setting


def relative(p: Params, s: Setting) -> Tensor | None:
    """p (h, T, T), p[h, i, j] the table's entry at offset i - j; arbitrary where i does not see j. None without a
    relative position."""
    if s.geo.offsets is None:
        return None
    table = p["table.weight"].flatten(1)
    if s.geo.prefix:
        table = torch.cat([table, p["table.prefix"]], 1)
    T = s.geo.offsets.shape[0]
    return table.index_select(1, s.geo.offsets.flatten()).view(-1, T, T)
