"""Interleaved timing. Every round runs every candidate once, so that other load on the machine affects all of them
alike. Only the ratios within one run are meaningful."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.utils.benchmark import Timer

from kernelbank.ops.linear import FORMS
from kernelbank.ops.machine import fused_linear_works

SPREAD = 1.3
"""The largest ratio of the quartiles for which a verdict is given."""
SHORTEST = 0.01
"""The shortest measurement in seconds. Shorter calls are repeated within it."""


@dataclass(frozen=True)
class Distribution:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Distribution:
        """The distribution of `values`, at least one."""
        if len(values) == 1:
            return Distribution(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return Distribution(median(values), low, high)

    @property
    def spread(self) -> float:
        """high / low."""
        return self.high / self.low if self.low else math.inf


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every candidate in every round and return its seconds per call, one value per round. Each candidate is
    warmed up twice, and each round starts with the next one."""
    threads, timers, numbers = torch.get_num_threads(), {}, {}
    for name, run in candidates.items():
        run()
        timers[name] = Timer("run()", globals={"run": run}, num_threads=threads)
        once = timers[name].timeit(1).median
        numbers[name] = max(1, math.ceil(SHORTEST / max(once, 1e-7)))
    names, seconds = list(candidates), {name: list[float]() for name in candidates}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(timers[name].timeit(numbers[name]).median)
    return seconds


def ratios(base: Sequence[float], other: Sequence[float]) -> Distribution:
    """The speed of `other` relative to `base` in each round."""
    return Distribution.of([b / o for b, o in zip(base, other, strict=True)])


def verdict(ratio: Distribution) -> str:
    """The conclusion that a ratio supports; none if its quartiles are more than SPREAD apart."""
    if ratio.spread > SPREAD:
        return f"none: quartiles {ratio.spread:.2f}x apart, more than {SPREAD}x"
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    return f"{ratio.median:.2f}x as fast" if ratio.median > 1 else f"{1 / ratio.median:.2f}x slower"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares: seconds ~ size^exponent."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def gemm_ceiling(dtype: torch.dtype, rounds: int = 7) -> float:
    """The multiply-adds per second of the fastest form of a linear layer: 1576 tokens, 384 -> 1536 channels."""
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1576, 384), (1536, 384), (1536,)))
    forms = {name: form for name, form in FORMS.items() if name != "mkldnn" or fused_linear_works()}
    with torch.no_grad():
        forms_seconds = interleave({name: partial(form, x, weight, bias) for name, form in forms.items()}, rounds)
    return x.shape[0] * weight.numel() / min(map(median, forms_seconds.values()))


# ---- memory ----------------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], object]) -> int | None:
    """The bytes by which a call of `run` raises the resident set, sampled every 0.5 ms. None on systems without
    /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    run()
    gc.collect()
    _trim_heap()
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before, top, done = resident(), [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            top[0] = max(top[0], resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(0, max(top[0], resident()) - before)


def _trim_heap() -> None:
    """Return freed memory to the system, so that the memory of the next call is visible in the resident set."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
