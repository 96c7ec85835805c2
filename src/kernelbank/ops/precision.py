"""What runs in float32 or wider, whatever the input and autocast say."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider: what statistics and generated kernels run in."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off: generated kernels, statistics and transforms run in float32 (design 1.3)."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
