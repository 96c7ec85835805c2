"""The Triton kernels against what a user would run instead, for ``benchmarks/gpu.py``.

A kernel has *twins*, which compute the same function without it (in eager mode and under torch.compile), and *others*,
which compute softmax attention on the same tokens: SDPA without a bias, SDPA with the relative position bias gathered
from the table, and FlexAttention with the bias read from the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from kernelbank.benchmark.timing import Distribution, ratios
from kernelbank.ops.geometry import relative_offsets
from kernelbank.ops.kernels import depthwise, moments, pointwise, regions
from kernelbank.ops.kernels.layout import Layout

Call = Callable[..., Tensor]
WINDOW = 7
SHORTEST = 0.005
"""Seconds that a measurement takes at least: shorter calls are repeated in it."""


@dataclass(frozen=True)
class Site:
    """`batch` images of `side` x `side` tokens, in `heads` heads of `width` channels."""

    batch: int
    side: int
    heads: int = 6
    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """N."""
        return self.side**2


@dataclass(frozen=True)
class Subject:
    """A kernel on a site: its path, its call, the calls it is compared with, the tensors that they take, and what it
    computes at least: floating-point operations and bytes of a forward pass."""

    path: str
    kernel: Call
    twins: Mapping[str, Call]
    others: Mapping[str, Call]
    tensors: tuple[Tensor, ...]
    flops: int
    bytes: int


# ---- subjects --------------------------------------------------------------------------------------------


def subjects(site: Site) -> Iterator[Subject]:
    """ReLU, LayerNorm and depth-wise self-attention with a relative table; softmax in windows of 7."""
    q, key, value, table = _attention_tensors(site)
    H, layout, scale = site.side, Layout(0, site.side, (site.side, site.side)), site.width**-0.5
    rows = torch.ones(3, site.tokens, device=site.device)
    rows[1], rows[2] = 0, 1 / site.tokens
    sides = [site.side, site.side]
    others = softmax_calls(site, scale)
    products = 4 * site.batch * site.heads * site.tokens**2 * site.width
    moved = (4 * q.numel() + table.numel()) * q.element_size()

    def relu(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return pointwise.pointwise_attention(q, k, v, t.flatten(1), rows, None, 0, H, sides, "relu", scale)

    def relu_twin(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return pointwise.naive(q, k, v, t.flatten(1), rows, None, layout, "relu", scale)

    def normed(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return moments.moments_attention(q, k, v, t.flatten(1), rows, 0, H, sides, True, scale)[0]

    def normed_twin(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return moments.naive(q, k, v, t.flatten(1), rows, layout, True, scale)[0]

    tensors = (q, key, value, table)
    yield Subject("triton_pointwise", relu, _twins(relu_twin), others, tensors, products, moved)
    yield Subject("triton_moments", normed, _twins(normed_twin), others, tensors, products, moved)

    def own(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return depthwise.depthwise_attention(_tokens(q), _tokens(k), t, H, H)[0]

    def own_twin(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return depthwise.naive(_tokens(q), _tokens(k), t, H, H)

    smaller = (3 * q.numel() + table.numel()) * q.element_size()
    yield Subject("triton_depthwise", own, _twins(own_twin), others, tensors, products // 2, smaller)
    if site.side % WINDOW == 0:
        yield _windows(site, q, key, value, rows, scale)


def _windows(site: Site, q: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> Subject:
    """Softmax attention in windows; the twins are SDPA on windows that are copied out of the map."""
    count, cells = site.side // WINDOW, WINDOW**2
    table = torch.randn(site.heads, 2 * WINDOW - 1, 2 * WINDOW - 1, device=site.device, requires_grad=True)
    at = torch.arange(site.tokens, device=site.device).view(count, WINDOW, count, WINDOW)
    members = at.transpose(1, 2).reshape(count**2, cells)
    back, numbers = members.flatten().argsort(), members.to(torch.int32)
    offsets = relative_offsets((WINDOW, WINDOW), (WINDOW, WINDOW), 0, torch.device(site.device))
    rows = torch.stack([torch.ones_like(rows[0]), torch.zeros_like(rows[0]), torch.ones_like(rows[0])])

    def attend(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return regions.region_attention(
            q, k, v, t.flatten(1), rows, numbers, WINDOW, [WINDOW, WINDOW], "softmax", scale
        )

    def twin(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        q, k, v = (x[:, :, members].transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, t.flatten(1)[:, offsets].to(q.dtype), scale=scale)
        return o.unflatten(0, (site.batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, back]

    flops = 4 * q.numel() * cells
    return Subject("triton_regions", attend, _twins(twin), {}, (q, key, value, table), flops,
                   (4 * q.numel() + table.numel()) * q.element_size())  # fmt: skip


def softmax_calls(site: Site, scale: float) -> dict[str, Call]:
    """Softmax attention without a bias, and with one by SDPA and by FlexAttention."""
    side = site.side
    offsets = relative_offsets((side, side), (side, side), 0, torch.device(site.device))

    def plain(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def gathered(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, t.flatten(1)[:, offsets].to(q.dtype), scale=scale)

    def flexible(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        flat = t.flatten(1)

        def bias(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            down, right = i // side - j // side + side - 1, i % side - j % side + side - 1
            return s + flat[h, down * (2 * side - 1) + right]

        return flex_attention(q, k, v, score_mod=bias, scale=scale)

    calls: dict[str, Call] = {"sdpa": plain, "sdpa with bias": gathered}
    return calls | ({"flex with bias": torch.compile(flexible)} if site.device == "cuda" else {})


def sdpa_backend(site: Site) -> str:
    """The name of the backend that SDPA without a bias takes: the fastest of those that serve, by torch's order."""
    q = torch.zeros(1, site.heads, site.tokens, site.width, dtype=site.dtype, device=site.device)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, q, q)
        except RuntimeError:
            continue
        return str(backend.name)
    return str(SDPBackend.MATH.name)


def _attention_tensors(site: Site) -> tuple[Tensor, ...]:
    """q, k and v (B, h, N, d) as views of (B, N, h, d), and the table in float32; all need gradients."""
    shape = (site.batch, site.tokens, site.heads, site.width)
    drawn = [torch.randn(shape, device=site.device).to(site.dtype).transpose(1, 2) for _ in range(3)]
    table = torch.randn(site.heads, 2 * site.side - 1, 2 * site.side - 1, device=site.device)
    return tuple(t.requires_grad_() for t in (*drawn, table))


def _tokens(x: Tensor) -> Tensor:
    """(B, h, N, d) as (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def _twins(call: Call) -> dict[str, Call]:
    return {"eager": call, "compiled": torch.compile(call, dynamic=False)}


# ---- timing ----------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], count: int, device: str) -> float:
    """Seconds of one of `count` calls: by CUDA events on a GPU."""
    if device != "cuda":
        begun = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begun) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call by round; every round runs all of them, and the order turns."""
    counts = {}
    for name, run in calls.items():
        for _ in range(3):
            run()
        counts[name] = max(1, min(200, math.ceil(SHORTEST / max(seconds(run, 1, device), 1e-6))))
    names, taken = list(calls), {name: list[float]() for name in calls}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            taken[name].append(seconds(calls[name], counts[name], device))
    return taken


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a call allocates beyond what is allocated before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def ceilings(site: Site) -> dict[str, float]:
    """Floating-point operations per second of a large matrix product, and bytes per second of a copy."""
    size = 8192 if site.device == "cuda" else 128
    a = torch.randn(size, size, device=site.device).to(site.dtype)
    b, into = a.clone(), torch.empty_like(a)
    taken = interleaved({"matmul": lambda: a @ b, "copy": lambda: into.copy_(a)}, 5, site.device)
    best = {name: min(values) for name, values in taken.items()}
    return {"flops_per_second": 2 * size**3 / best["matmul"],
            "bytes_per_second": 2 * a.numel() * a.element_size() / best["copy"]}  # fmt: skip


def forward(call: Call, tensors: tuple[Tensor, ...]) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        call(*tensors)


def step(call: Call, tensors: tuple[Tensor, ...], upstream: Tensor) -> None:
    """A forward and a backward pass with gradients of every tensor that the call depends on."""
    o = call(*tensors)
    torch.autograd.grad(o, tensors, upstream.view_as(o) if o.ndim == 3 else upstream, allow_unused=True)


def measure(site: Site, rounds: int, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """One line per kernel and pass: medians, ratios to every call it is compared with, peak memory, and the share of
    the least time that its operations and bytes need."""
    lines = []
    for subject in subjects(site):
        calls = {"kernel": subject.kernel, **subject.twins, **subject.others}
        upstream = torch.randn_like(subject.tensors[0]).contiguous()
        passes: dict[str, Callable[[Call], Callable[[], None]]] = {
            "forward": lambda call, s=subject: partial(forward, call, s.tensors),  # type: ignore[misc]
            "forward and backward": lambda call, s=subject, u=upstream: partial(step, call, s.tensors, u),  # type: ignore[misc]
        }
        for name, bound in passes.items():
            runs = {key: bound(call) for key, call in calls.items()}
            taken = interleaved(runs, rounds, site.device)
            median = {key: Distribution.of(values) for key, values in taken.items()}
            ahead = {key: ratios(taken[key], taken["kernel"]) for key in taken if key != "kernel"}
            work = 1.0 if name == "forward" else 3.5  # five products of the backward pass beside two
            floor = max(work * subject.flops / limits["flops_per_second"], subject.bytes / limits["bytes_per_second"])
            lines.append({
                "path": subject.path, "batch": site.batch, "tokens": site.tokens, "heads": site.heads,
                "width": site.width, "pass": name, "seconds": {key: vars(d) for key, d in median.items()},
                "ratios": {key: vars(d) for key, d in ahead.items()},
                "ratio_to_best_other": min(ahead[key].median for key in subject.twins),
                "peak_bytes": {key: peak_bytes(run, site.device) for key, run in runs.items()},
                "flops": subject.flops, "bytes": subject.bytes,
                "share_of_floor": floor / median["kernel"].median,
            })  # fmt: skip
    return lines
