"""Random small calls of the kernels against their naive forms in float64: run with TRITON_INTERPRET=1 on a CPU, or on a
GPU. ``python tests/ops/kernel_cases.py [DEVICE] [SEEDS]`` prints one JSON line per case."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernelbank.ops.kernels import depthwise, moments, pointwise, regions
from kernelbank.ops.kernels.launch import launches
from kernelbank.ops.kernels.layout import ACTIVATIONS, Layout

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Relative to the largest value of a tensor: rounding of the inputs of products, and of what is stored."""

Gradients = dict[str, Tensor]
Run = Callable[..., Tensor]


def run(function: Run, tensors: dict[str, Tensor | None], upstream: Tensor) -> Gradients:
    """The output and the gradient of every tensor."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    o = function(**leaves)
    o.backward(upstream.to(o.dtype))
    found = {"output": o.detach()}
    return found | {name: t.grad for name, t in leaves.items() if t is not None and t.grad is not None}


def errors(kernel: Run, naive: Run, tensors: dict[str, Tensor | None], upstream: Tensor) -> dict[str, float]:
    """The largest difference of each result, relative to the largest value of the float64 one."""
    ours = run(kernel, tensors, upstream)
    theirs = run(naive, {name: None if t is None else t.double() for name, t in tensors.items()}, upstream.double())
    assert ours.keys() == theirs.keys()
    return {
        name: float((ours[name].double() - t).abs().max() / t.abs().max().clamp(min=1e-3)) for name, t in theirs.items()
    }


def rows_of(T: int, n: int, act: str, choose: Callable[..., object], device: str) -> Tensor:
    """g, c and w, different for every query."""
    gain = torch.rand(T, device=device) + 0.5
    shift = torch.randn(T, device=device) / 4
    weight = (torch.rand(T, device=device) + 0.5) / (1 if act == "softmax" else n)
    return torch.stack([gain, shift, weight])


def attention_case(seed: int, dtype: torch.dtype, device: str) -> tuple[str, dict[str, float]]:
    """Pointwise activations and LayerNorm over all kernels: tables, prefixes, regions, any number of tokens."""
    choose = random.Random(seed).choice
    act = choose([*ACTIVATIONS, "layernorm", "rmsnorm"])
    B, h, d, P = choose((1, 2)), choose((1, 2)), choose((8, 32, 64)), choose((0, 0, 1, 3))
    H, W = choose(((1, 1) if act in ACTIVATIONS else (2, 2), (1, 17), (3, 4), (2, 17), (5, 6), (7, 3)))
    table = choose((True, True, False))
    T = P + H * W
    n = T if table else choose((T, 5, 37))
    by_region = act in ACTIVATIONS and n == T and choose((True, False))
    sides = (H + choose((0, 2)), W + choose((0, 1)))
    entries = (2 * sides[0] - 1) * (2 * sides[1] - 1) + (3 if P else 0)
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    tensors: dict[str, Tensor | None] = {
        "q": draw(B, T, h, d).transpose(1, 2), "key": draw(B, n, h, d).transpose(1, 2), "value": draw(B, h, n, d),
        "entries": torch.randn(h, entries, device=device) if table else None,
    }  # fmt: skip
    rows, upstream = rows_of(T, n, act, choose, device), draw(B, h, T, d)
    own = torch.randint(0, 3, (T,), device=device, dtype=torch.int32)
    own[:P] = -1
    area, layout, scale = own if by_region else None, Layout(P, W, sides), d**-0.5
    label = f"{act} B={B} h={h} d={d} T={T} n={n} P={P} grid={H}x{W} table={table} regions={by_region}"
    if act in ACTIVATIONS:
        op = lambda **t: pointwise.pointwise_attention(*t.values(), rows, area, P, W, list(sides), act, scale)  # noqa: E731
        naive = lambda **t: pointwise.naive(*t.values(), rows, area, layout, act, scale)  # noqa: E731
    else:
        centred = act == "layernorm"
        op = lambda **t: moments.moments_attention(*t.values(), rows, P, W, list(sides), centred, scale)[0]  # noqa: E731
        naive = lambda **t: moments.naive(*t.values(), rows, layout, centred, scale)[0]  # noqa: E731
    return label, errors(op, naive, tensors, upstream)


def depthwise_case(seed: int, dtype: torch.dtype, device: str) -> tuple[str, dict[str, float]]:
    """Depth-wise self-attention and its positional term alone."""
    choose = random.Random(seed).choice
    B, h, d = choose((1, 2, 3)), choose((1, 2)), choose((5, 8, 32))
    (H, W), gated = choose(((1, 5), (3, 4), (2, 18), (5, 1), (7, 6))), choose((True, True, False))
    sides = (H + choose((0, 2)), W + choose((0, 1)))
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    tensors = {
        "q": draw(B, H * W, h * d) if gated else None, "x": draw(B, H * W, h * d),
        "table": torch.randn(h, 2 * sides[0] - 1, 2 * sides[1] - 1, device=device),
    }  # fmt: skip
    label = f"depthwise B={B} h={h} d={d} grid={H}x{W} table={sides[0]}x{sides[1]} gate={gated}"
    op = lambda **t: depthwise.depthwise_attention(*t.values(), H, W)[0]  # noqa: E731
    naive = lambda **t: depthwise.naive(*t.values(), H, W)  # noqa: E731
    return label, errors(op, naive, tensors, draw(B, H * W, h * d))


def region_case(seed: int, dtype: torch.dtype, device: str) -> tuple[str, dict[str, float]]:
    """Windows of a shuffled set of tokens, some with empty cells."""
    choose = random.Random(seed).choice
    act = choose([*ACTIVATIONS, *regions.ROWWISE, *regions.ROWWISE])
    B, h, d, (M, side), R = (
        choose((1, 2)),
        choose((1, 2)),
        choose((8, 32)),
        choose(((2, 3), (4, 4), (7, 7))),
        choose((2, 5)),
    )
    L = M * side
    present = torch.rand(R, L, device=device) < 0.8
    present[:, 0] = True
    members = torch.full((R, L), -1, dtype=torch.int32, device=device)
    T = int(present.sum())
    members[present] = torch.randperm(T, device=device).to(torch.int32)
    table, sides = choose((True, True, False)), [M + choose((0, 1)), side]
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    entries = torch.randn(h, (2 * sides[0] - 1) * (2 * sides[1] - 1), device=device) if table else None
    q, key = draw(B, T, h, d).transpose(1, 2), draw(B, T, h, d).transpose(1, 2)
    tensors: dict[str, Tensor | None] = {"q": q, "key": key, "value": draw(B, h, T, d), "entries": entries}
    rows, scale = rows_of(T, L, act, choose, device), d**-0.5
    label = f"{act} in regions B={B} h={h} d={d} R={R} L={L} T={T} table={table}"
    op = lambda **t: regions.region_attention(*t.values(), rows, members, side, sides, act, scale)  # noqa: E731
    naive = lambda **t: regions.naive(*t.values(), rows, members, side, sides, act, scale)  # noqa: E731
    return label, errors(op, naive, tensors, draw(B, h, T, d))


def overflow_case(seed: int, dtype: torch.dtype, device: str) -> tuple[str, dict[str, float]]:
    """Squared scores beyond the range of float16, whose mean is inside it: the scale stands before the square."""
    B, h, T, d = 1, 1, 37, 32
    q, key = (torch.randn(B, h, T, d, device=device).to(dtype) * 5 for _ in range(2))
    tensors: dict[str, Tensor | None] = {
        "q": q, "key": key, "value": torch.randn(B, h, T, d, device=device).to(dtype), "entries": None,
    }  # fmt: skip
    rows = torch.stack([torch.full((T,), T**-0.5), torch.zeros(T), torch.ones(T)]).to(device)
    layout = Layout(0, T, (1, 1))
    largest = float((q.double() @ key.double().mT).max())
    assert largest**2 > 65504, "the case does not overflow without the scale"
    op = lambda **t: pointwise.pointwise_attention(*t.values(), rows, None, 0, T, [1, 1], "relu2", 1.0)  # noqa: E731
    naive = lambda **t: pointwise.naive(*t.values(), rows, None, layout, "relu2", 1.0)  # noqa: E731
    upstream = torch.randn(B, h, T, d, device=device).to(dtype) / 256
    return f"relu2 of scores up to {largest:.0f}", errors(op, naive, tensors, upstream)


CASES = {"attention": attention_case, "depthwise": depthwise_case, "regions": region_case, "overflow": overflow_case}


def cases(device: str, seeds: int, dtypes: list[torch.dtype]) -> Iterator[dict[str, object]]:
    """Every kind of call, dtype and seed."""
    for kind, case in CASES.items():
        for dtype in dtypes:
            for seed in range(seeds if kind == "attention" else 1 if kind == "overflow" else -(-seeds // 2)):
                torch.manual_seed(seed)
                label, found = case(seed, dtype, device)
                yield {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "case": label, "errors": found,
                       "tolerance": TOLERANCE[dtype]}  # fmt: skip


def main() -> None:
    """Print every case."""
    device, seeds = (sys.argv[1:] + ["cpu", "8"][len(sys.argv) - 1 :])[:2]
    assert launches(torch.zeros(1, device=device)), "no kernel is launched here: set TRITON_INTERPRET=1"
    # numpy has no bfloat16, and Triton's interpreter multiplies its bits as integers
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device != "cpu" else [])
    for line in cases(device, int(seeds), dtypes):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
