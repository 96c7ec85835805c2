"""Computation in float32 or wider, whatever the dtype of the input and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider: the dtype of statistics and generated kernels."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off: generated kernels, statistics and Fourier transforms run in float32."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
