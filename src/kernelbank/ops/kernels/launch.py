"""What every kernel needs on the host: Triton where it is installed, block sizes, precision and the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for CPUs alone come without Triton
    triton = tl = None

WIDEST_HEAD = 128
"""The most channels of a head that a kernel holds in registers."""
OLDEST = (8, 0)
"""The oldest compute capability with tensor cores for bfloat16."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that kernels run in. Sums are in float32."""


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the function itself where there is no Triton: then nothing launches it."""
    return function if triton is None else triton.jit(function)


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: Triton reads the variable when it is imported."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def launches(x: Tensor) -> bool:
    """Whether a kernel can be launched on `x`: it is on a GPU, or the interpreter runs."""
    return triton is not None and x.dtype in DTYPES and (x.is_cuda or interpreted())


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The device of `x` as the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16, the least side of a product on tensor cores, to `most`."""
    return max(16, min(most, 1 << (max(size, 1) - 1).bit_length()))


def precision(x: Tensor) -> str:
    """How products of float32 run: in TF32 where ``torch.backends.cuda.matmul.fp32_precision`` says so, or, where it is
    "none", ``torch.backends.fp32_precision``; else in full."""
    backends: Any = torch.backends  # the stubs of torch know neither attribute
    own = backends.cuda.matmul.fp32_precision
    stated = backends.fp32_precision if own == "none" else own
    return "tf32" if x.is_cuda and stated == "tf32" else "ieee"


@dataclass(frozen=True)
class Gpu:
    """What the choice of a kernel asks of a GPU."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    """The most bytes of shared memory of a program."""


def gpu(device: torch.device | None) -> Gpu:
    """The GPU that `device` names, None the current one. A compiler takes it as a constant."""
    return Gpu(*_properties(None if device is None else device.index))


@torch.compiler.assume_constant_result
@cache
def _properties(index: int | None) -> tuple[str, tuple[int, int], int]:
    found = torch.cuda.get_device_properties(index)
    memory = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return found.name, (found.major, found.minor), int(memory)


@cache
def multiprocessors(index: int | None) -> int:
    """The number of multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def parts(work: int, programs: int, x: Tensor) -> int:
    """Into how many parts to cut `work` items that one program would do in turn, where `programs` programs run beside
    each other: enough for four programs per multiprocessor. Two on CPUs, so that tests meet several."""
    wanted = -(-4 * multiprocessors(x.device.index) // max(programs, 1)) if x.is_cuda else 2
    return max(1, min(work, wanted))
