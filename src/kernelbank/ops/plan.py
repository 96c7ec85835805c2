"""`mix`: the operator, and `plan`: the one pure function that says which path runs it and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelbank.inventory import Grid
from kernelbank.ops import conv, kernel, reference
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import Geometry, crop, geometry, lay_out
from kernelbank.ops.setting import Params, Setting, check_input, check_mask
from kernelbank.spec import MixerSpec, TwoStep
from kernelbank.text import suggest

Core = Callable[[Tensor, Tensor, Params, Setting], Tensor]


class PathError(ValueError):
    """A forced path that cannot serve the record; the message says why and names the paths that can."""


@dataclass(frozen=True)
class Plan:
    """The path that runs the operator, and the reason it was chosen."""

    path: str
    reason: str


@dataclass(frozen=True)
class Path:
    """A way to run the operator. `refuses` says why it cannot serve a setting, or None."""

    run: Callable[[Tensor, Params, Setting], Tensor]
    refuses: Callable[[Setting], str | None]


def _framed(core: Core) -> Callable[[Tensor, Params, Setting], Tensor]:
    """The static convs around a core, on the padded layout where the record states one."""

    def run(x_BTC: Tensor, p: Params, s: Setting) -> Tensor:
        operand, source = enter(lay_out(x_BTC, s.geo), p, s.spec, s.training)
        return crop(leave(core(operand, source, p, s), p, s.spec, s.training), s.geo)

    return run


def _vectorised(operand: Tensor, source: Tensor, p: Params, s: Setting) -> Tensor:
    core = kernel.two_step if isinstance(s.spec.kernel, TwoStep) else kernel.one_step
    return core(operand, source, p, s)


def _refuse_one_step(s: Setting) -> str | None:
    return (
        None
        if isinstance(s.spec.kernel, TwoStep)
        else f"it writes kernel two_step as convolutions, not {s.spec.kernel}"
    )


def _refuse_dropout(s: Setting) -> str | None:
    return "it has no attention dropout" if s.training and s.attn_drop else None


PATHS: dict[str, Path] = {
    "vectorised": Path(_framed(_vectorised), lambda s: None),
    "conv": Path(_framed(conv.two_step), _refuse_one_step),
    "reference": Path(reference.mixer, _refuse_dropout),
}

# The forced paths, innermost last. A list and no ContextVar: torch.compile cannot trace the latter on torch 2.11.
_forced: list[str] = []


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Force a path in this process: ``with kernelbank.use_path("conv"):``.

    Raises PathError here for an unknown name, and inside for a record that the path cannot serve.
    """
    if name not in PATHS:
        raise PathError(f"unknown path {name!r}{suggest(name, PATHS)}; legal: {', '.join(PATHS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def plan(
    spec: MixerSpec,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    grad: bool,
    machine: str | None = None,
) -> Plan:
    """The path for `spec` on inputs (B, T, C) of `dtype` on `device`, with or without gradients, on a `machine`
    as probed, and the reason. Pure: the same question has the same answer."""
    return Plan("vectorised", "the vectorised form serves every record, and no faster path is admitted yet")


def mix(
    x: Tensor,
    params: Params,
    spec: MixerSpec,
    num_heads: int,
    grid: Grid,
    *,
    prefix: int = 0,
    attn_mask: Tensor | None = None,
    training: bool = False,
    attn_drop: float = 0.0,
    temperature: float | None = None,
    geo: Geometry | None = None,
) -> Tensor:
    """The operator: the mixer `spec` with `params` (named as `inventory` lists them) on x (B, T, C) -> (B, T, C).

    T = prefix + H * W with `grid` = (H, W). `attn_mask`, boolean, True where a query may see a kernel: (T, T),
    (B, T, T) or (B, 1, T, T). `geo` is the geometry if it is at hand. In training, BatchNorm buffers among the
    params are updated in place.

    Raises SpecError for a shape that does not fit, an unresolved alternate shift or a mask that the record cannot
    honour, and PathError when a forced path cannot serve.
    """
    check_input(x, spec, grid, prefix)
    s = Setting(
        spec,
        x.shape[-1],
        num_heads,
        geometry(spec, grid, prefix, x.device) if geo is None else geo,
        training,
        temperature,
        attn_drop,
        None if attn_mask is None else check_mask(attn_mask, x, spec),
    )
    grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params.values()))
    shape = (x.shape[0], x.shape[1], x.shape[2])
    name = _forced[-1] if _forced else plan(spec, shape, x.device, x.dtype, grad).path
    if reason := PATHS[name].refuses(s):
        able = ", ".join(other for other, path in PATHS.items() if path.refuses(s) is None)
        raise PathError(f"path {name!r} cannot serve {spec}: {reason}; paths that can: {able}")
    return PATHS[name].run(x, params, s)
