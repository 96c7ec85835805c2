"""Mixers on the paths of Triton against the definition in float64, with every gradient; run as `kernel_cases`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from equality import build, draw, run
from strategies import Host

from kernelbank import MixerSpec, use_path
from kernelbank.ops.kernels.launch import launches

SPECS = (
    ("triton_pointwise", "relu_attention", Host(64, 2, (4, 4), 1, 2)),
    ("triton_pointwise", "relu_attention activation=relu2,count position=relative", Host(64, 2, (5, 3), 2, 1)),
    ("triton_pointwise", "sigmoid_attention position=relative", Host(32, 1, (3, 4), 0, 2)),
    ("triton_pointwise", "identity_attention activation=scale(0.5),log_count,gelu,count", Host(32, 2, (3, 4), 1, 2)),
    ("triton_pointwise", "identity_attention", Host(32, 2, (4, 3), 0, 2)),
    ("triton_pointwise", "relu_attention size=3", Host(16, 2, (3, 4), 0, 1)),
    ("triton_pointwise", "strided_bank activation=relu,count", Host(16, 2, (3, 4), 1, 1)),
    ("triton_pointwise", "linformer mix=project(5) activation=relu,count", Host(16, 2, (3, 4), 1, 1)),
    ("triton_pointwise", "swin support=window(3, 1) activation=log_count,gelu,count", Host(16, 2, (5, 4), 2, 1)),
    ("triton_pointwise", "vit support=grid(2) activation=relu,count", Host(16, 2, (5, 4), 1, 1)),
    ("triton_moments", "layernorm_attention", Host(64, 2, (4, 4), 1, 2)),
    ("triton_moments", "layernorm_attention activation=scale(2),rmsnorm,count", Host(32, 2, (3, 5), 0, 2)),
    ("triton_depthwise", "dwsa", Host(32, 2, (4, 5), 0, 3)),
    ("triton_depthwise", "dwsa bank=dynamic(2,tanh) frame=bare", Host(32, 2, (4, 5), 0, 3)),
    ("triton_toeplitz", "dwsa", Host(32, 2, (4, 5), 2, 2)),
    ("triton_toeplitz", "identity_attention", Host(32, 2, (4, 5), 0, 2)),
    ("triton_regions", "swin support=window(3, 1)", Host(32, 2, (5, 6), 0, 2)),
    ("triton_regions", "swin support=window(3, 1, timm)", Host(32, 2, (5, 5), 0, 1)),
    ("triton_regions", "swin support=window(3, 1, mmpretrain)", Host(32, 2, (5, 5), 0, 1)),
    ("triton_regions", "swin support=window(2) activation=layernorm,count", Host(32, 2, (5, 6), 0, 2)),
    ("triton_regions", "swin support=window(3) activation=relu,count", Host(32, 2, (6, 4), 0, 2)),
)  # fmt: skip
"""(path, spec, host) of every path, with prefix tokens, windows, paddings and sides that no tile divides."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def case(path: str, text: str, host: Host, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest difference of each result, relative to the largest value of the definition's in float64 with the
    weights rounded to `dtype`."""
    mixer = build(MixerSpec.parse(text).at_block(0), host).to(device, dtype)
    exact = build(MixerSpec.parse(text).at_block(0), host)
    exact.load_state_dict({name: t.double().cpu() for name, t in mixer.state_dict().items()})
    x, upstream = (t.to(dtype) for t in draw(exact, host.batch))
    defined = run(exact, "reference", x.double(), upstream.double())
    ours = run(mixer, path, x.to(device), upstream.to(device))
    # a bias may have a gradient of zero, as a key's under softmax: its error is one of its weight's gradient
    size = {name: t.abs().max().clamp(min=1e-2) for name, t in defined.items() if t.is_floating_point() and t.numel()}
    size |= {name: torch.maximum(size[name], size[weight]) for name in size
             if (weight := name.replace(".bias", ".weight")) in size}  # fmt: skip
    return {name: float((ours[name].cpu().double() - defined[name]).abs().max() / most) for name, most in size.items()}


def autocast_case(path: str, text: str, host: Host, dtype: torch.dtype, device: str) -> dict[str, float]:
    """The same under autocast, outputs alone; the gradients must be finite and in float32."""
    mixer = build(MixerSpec.parse(text).at_block(0), host).to(device, torch.float32)
    exact = build(MixerSpec.parse(text).at_block(0), host)
    x = draw(exact, host.batch)[0].float()
    with use_path("reference"):
        defined = exact(x.double())
    with use_path(path), torch.autocast(device, dtype):
        y = mixer(x.to(device))
    y.float().sum().backward()
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in mixer.parameters()
    )
    return {
        "output": float(
            (y.detach().cpu().double() - defined.detach()).abs().max() / defined.detach().abs().max().clamp(min=1e-2)
        )
    }


def cases(device: str) -> Iterator[dict[str, object]]:
    """Every spec in float32. In half precision every spec on a GPU, and in the interpreter one of each path; under
    autocast too."""
    half = [torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16]
    paths = [path for path, _, _ in SPECS]
    first_of_each = {paths.index(path) for path in paths}
    for at, (path, text, host) in enumerate(SPECS):
        dtypes = [torch.float32, *(half if device != "cpu" or at in first_of_each else [])]
        for dtype in dtypes:
            for kind, check in (("path", case), ("autocast", autocast_case)):
                if kind == "autocast" and dtype == torch.float32:
                    continue
                found = check(path, text, host, dtype, device)
                yield {"kind": kind, "dtype": str(dtype).removeprefix("torch."), "case": f"{path}: {text}",
                       "errors": found, "tolerance": TOLERANCE[dtype]}  # fmt: skip


def main() -> None:
    """Print every case."""
    device = (sys.argv[1:] or ["cpu"])[0]
    assert launches(torch.zeros(1, device=device)), "no kernel is launched here: set TRITON_INTERPRET=1"
    for line in cases(device):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
