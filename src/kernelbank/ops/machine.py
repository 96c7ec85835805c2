"""The measured properties of this machine, from one probe per process. The plan reads them, so that it may take another
path on another processor."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kernelbank.ops.linear import FORMS, Linear, onednn, plain
from kernelbank.ops.scope import ForkSafeLock, Scope
from kernelbank.ops.transforms import recorded, transformed

ROWS = (197, 1576)
"""The tokens of the two shapes that are timed: one image and eight, 384 -> 1152 channels."""
ROUNDS = 9

_log = logging.getLogger("kernelbank")


@dataclass(frozen=True)
class Machine:
    """The properties of a machine. `gains` is the speed of each form of a linear layer relative to F.linear, for few
    and for many tokens (in `dtype`, no gradient). It is empty if the machine was not probed, for the given `reason`."""

    device: str = "cpu"
    threads: int = 1
    onednn: bool = False
    fused: bool = False
    gains: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    reason: str = ""
    dtype: torch.dtype = torch.float32

    def gain(self, form: str, tokens: int) -> float:
        """Return the speed of `form` relative to F.linear at the probed number of tokens nearest to `tokens`."""
        few, many = self.gains.get(form, (0.0, 0.0))
        return few if tokens < sum(ROWS) / 2 else many

    def describe(self) -> str:
        """Return the machine in one line of text."""
        if self.reason:
            return f"{self.device}, {self.threads} threads, not probed: {self.reason}; linear layers run as F.linear"
        gains = ", ".join(f"{name} {few:.2f}x / {many:.2f}x" for name, (few, many) in self.gains.items())
        return (
            f"{self.device}, {self.threads} threads, oneDNN {'yes' if self.onednn else 'no'}, fused linear "
            f"{'yes' if self.fused else 'no'}; against F.linear at {ROWS[0]} / {ROWS[1]} tokens: {gains}"
        )


_probed: dict[tuple[str, int, torch.dtype], Machine] = {}
_LOCK = ForkSafeLock()
_fixed = Scope("kernelbank_unprobed", False)


@contextmanager
def unprobed() -> Iterator[None]:
    """Ignore the probe inside the context, in this thread and task: linear layers run as F.linear.

    A training run then computes the same numbers on a loaded and on an idle machine.
    """
    with _fixed.entered(True):
        yield


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Return the machine of `device` with the current number of threads, which is probed at the first call.

    The probe runs in bfloat16 if that is the `dtype` and the processor has instructions for it, else in float32. There
    are no gains inside `unprobed`, in a graph or under a transform, which would record or transform the probe.
    """
    if recorded() or transformed():
        return Machine(device, reason="graphs and transforms run F.linear")
    threads = torch.get_num_threads()
    if _fixed.get():
        return Machine(device, threads, reason="the run fixes the form of linear layers")
    with _LOCK:
        half = device == "cpu" and dtype == torch.bfloat16 and _has_bfloat16()
        timed = torch.bfloat16 if half else torch.float32
        key = device, threads, timed
        if key not in _probed:
            with _disable_current_modes():  # modes that record operations must not include the probe
                profile = probe(device, timed)
            if profile.reason and device == "cpu":
                _log.info("linear layers run as F.linear: %s", profile.reason)
            _probed[key] = profile
        return _probed[key]


def _has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor; without its instructions that is slow."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def probe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Compare the speed of the forms of a linear layer. A machine that cannot be probed has no gains, and a reason."""
    threads, has = torch.get_num_threads(), torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if device != "cpu":
        return Machine(device, threads, reason="the forms are those of a CPU")
    if not has:
        return Machine(device, threads, reason="this torch has no oneDNN")
    if (os.cpu_count() or 1) == 1:
        return Machine(device, threads, True, reason="one core cannot time and work at once")
    fused = fused_linear_works()
    candidates = {name: form for name, form in FORMS.items() if name != "mkldnn" or fused}
    few, many = (_gains(candidates, rows, dtype) for rows in ROWS)
    return Machine(device, threads, True, fused, {name: (few[name], many[name]) for name in candidates}, dtype=dtype)


def fused_linear_works() -> bool:
    """Whether torch's private oneDNN linear exists here and computes what F.linear computes, GELU included."""
    x, weight, bias = (
        torch.linspace(-1, 1, n, device="cpu").view(shape) for n, shape in ((32, (2, 16)), (128, (8, 16)), (8, (8,)))
    )
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return all(
                torch.allclose(onednn(x, weight, bias, gelu), plain(x, weight, bias, gelu), atol=1e-5)
                for gelu in (False, True)
            )
    except (AttributeError, RuntimeError, TypeError):
        return False


def half_gain(dtype: torch.dtype) -> float:
    """Return the speed of F.linear in `dtype` relative to the fastest form in float32, on this CPU and for many tokens,
    or 0 where it does not run. It is measured at the first call."""
    key = dtype, torch.get_num_threads()
    with _LOCK:
        if key not in _half_gains:
            forms = {name: form for name, form in FORMS.items() if name != "mkldnn" or fused_linear_works()}
            tensors = _tensors(ROWS[1])
            steps = {name: partial(form, *tensors) for name, form in forms.items()}
            try:
                x, weight, bias = (tensor.to(dtype) for tensor in tensors)
                least = _least(steps | {"half": partial(plain, x, weight, bias)})
                half = least.pop("half")
                _half_gains[key] = round(min(least.values()) / half, 2)
            except RuntimeError:  # torch has no kernel for the dtype
                _half_gains[key] = 0.0
        return _half_gains[key]


_half_gains: dict[tuple[torch.dtype, int], float] = {}


def _gains(forms: dict[str, Linear], rows: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the time of F.linear over that of each form."""
    tensors = [tensor.to(dtype) for tensor in _tensors(rows)]
    least = _least({name: partial(form, *tensors) for name, form in forms.items()})
    return {name: round(least["linear"] / seconds, 2) for name, seconds in least.items()}


def _tensors(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of the linear layer that is timed."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, device="cpu") for shape in ((rows, 384), (1152, 384), (1152,))
    )
    return x, weight, bias


def _least(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of each step, the minimum over ROUNDS turns, since other load can only add time."""
    least = dict.fromkeys(steps, float("inf"))
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(ROUNDS + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                least[name] = min(least[name], time.perf_counter() - start)
    return least
