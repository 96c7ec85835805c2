"""Run a mixer on a path with every gradient, and compare two runs."""

from __future__ import annotations

import torch
from strategies import Host
from torch import Tensor

from kernelbank import Mixer, use_path
from kernelbank.spec import MixerSpec

Run = dict[str, Tensor]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers on the default device, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device())


def build(spec: MixerSpec, host: Host, seed: int = 0, dtype: torch.dtype = torch.float64) -> Mixer:
    """A mixer with every parameter and statistic random."""
    mixer = Mixer(spec, host.dim, host.num_heads, host.grid, prefix=host.prefix, dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, tensor in mixer.tensors().items():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            tensor.copy_(0.5 + drawn.abs() if "running_var" in name else drawn / 2)
    return mixer


def draw(mixer: Mixer, batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens and a random gradient of the output, in the mixer's dtype and on its device."""
    count = mixer.prefix + mixer.grid[0] * mixer.grid[1]
    generator = torch.Generator("cpu").manual_seed(seed)
    like = next(mixer.parameters(), torch.empty(0, dtype=torch.float64))
    shape = (batch, count, mixer.dim)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2))
    return x.to(like), g.to(like)


def run(mixer: Mixer, path: str, x: Tensor, upstream: Tensor, mask: Tensor | None = None) -> Run:
    """Output, gradient of the input and of every parameter, and every buffer afterwards (then restored)."""
    mixer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    kept = {name: b.clone() for name, b in mixer.named_buffers()}
    with use_path(path):
        y = mixer(x, attn_mask=mask)
    if y.requires_grad:  # a literal row that a mask empties has no graph at all
        (y * upstream).sum().backward()
    result = {"output": y.detach(), "input gradient": torch.zeros_like(x) if x.grad is None else x.grad}
    result |= {f"{n} gradient": torch.zeros_like(p) if p.grad is None else p.grad for n, p in mixer.named_parameters()}
    result |= {f"{n} after": b.clone() for n, b in mixer.named_buffers() if b.is_floating_point()}
    for name, buffer in mixer.named_buffers():
        buffer.copy_(kept[name])
    return result


def worst(a: Run, b: Run) -> tuple[float, str]:
    """The largest difference relative to 1 + the largest value, and where it is."""
    assert a.keys() == b.keys()
    errors = {}
    for name in a:
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype, name
        assert bool(a[name].isfinite().all()) and bool(b[name].isfinite().all()), name
        errors[name] = float((a[name].double() - b[name].double()).abs().max() / (1 + b[name].double().abs().max())) \
            if a[name].numel() else 0.0  # fmt: skip
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where
