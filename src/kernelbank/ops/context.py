"""The description of a call of the operator: `Context` for the mixer, and `Call` for the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernelbank.ops.geometry import Geometry
from kernelbank.ops.linear import Linear, plain
from kernelbank.ops.transforms import recorded, transformed, untransformed
from kernelbank.spec import Dynamic, Grouped, MixerSpec, Own, Project, SpecError, Window
from kernelbank.spec.inventory import Grid, SizedSpec

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Context(SizedSpec):
    """The mixer `spec` at `dim` channels and `num_heads` heads on `geo`, and how it runs.

    `temperature` replaces tau of a predict spec in training; `attn_drop` drops entries of the attention map in
    training; `mask` (B or 1, 1, T, T), True where a query may see a kernel, narrows what the spec sees. `modules` are
    the linear layers, by name, that must be called as modules: they have hooks, are parametrised or replaced. `linear`
    runs the others, `position` the positional operator where a path has no N x N map for it; the plan fills both.
    `product` multiplies the matrices of attention, (..., n, e) by (..., e, m), where a path has several forms of it.
    """

    geo: Geometry
    training: bool = False
    temperature: float | None = None
    attn_drop: float = 0.0
    mask: Tensor | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    linear: Linear = plain
    position: Callable[[Tensor, Tensor, Grid], Tensor] | None = None
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    @property
    def shared(self) -> int:
        """R: the weights of a generated one-step kernel per tap, one per channel or one per group."""
        return self.groups if isinstance(self.spec.kernel, Grouped) else self.dim

    @property
    def visible(self) -> Tensor | None:
        """V (B or 1, 1, T, n) under the spec and the mask; None when every position sees every kernel."""
        visible = None if self.geo.visible is None else self.geo.visible[None, None]
        if self.mask is None:
            return visible
        return self.mask if visible is None else visible & self.mask


@dataclass(frozen=True)
class Call:
    """The properties of an input: the number of `tokens` in all images (1 where a compiler must not depend on it), the
    device and dtype, whether gradients are needed, and whether autocast, a compiler or a transform of torch.func is
    active."""

    tokens: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad: bool = False
    autocast: bool = False
    compiling: bool = False
    transformed: bool = False

    @staticmethod
    def of(x: Tensor, learns: bool) -> Call:
        """Return the call with input `x` (..., C). `learns` states whether a tensor in it requires a gradient."""
        compiling = recorded()
        return Call(
            1 if compiling else x.numel() // max(x.shape[-1], 1),
            x.device.type,
            x.dtype,
            learns and torch.is_grad_enabled(),
            not x.is_meta and torch.is_autocast_enabled(x.device.type),
            compiling,
            False if compiling else transformed(),
        )


def check_input(x: Tensor, spec: MixerSpec, grid: Grid, prefix: int) -> None:
    """Raise SpecError unless x is (B, T, C) with T = prefix + H * W and an alternating shift is resolved."""
    if x.ndim != 3 or x.shape[1] != prefix + grid[0] * grid[1]:
        raise SpecError(
            f"invalid x of shape {tuple(x.shape)}; expected (B, T, C) with T = {prefix} prefix tokens + {grid[0]} x "
            f"{grid[1]} positions = {prefix + grid[0] * grid[1]}"
        )
    spec.check_resolved()


def check_mask(mask: Tensor, x: Tensor, spec: MixerSpec) -> Tensor:
    """Return the mask as `read_mask` does. Raises SpecError if the spec does not support a mask, and as `read_mask`."""
    if not isinstance(spec.bank, Dynamic) or spec.bank.stride > 1 or isinstance(spec.mix, Project):
        raise SpecError(f"invalid attn_mask for {spec}; expected none, since its kernels belong to no single position")
    if isinstance(spec.support, Own) or (isinstance(spec.support, Window) and spec.support.pad != "masked"):
        raise SpecError(f"invalid attn_mask for support={spec.support}; expected none")
    return read_mask(mask, x)


def read_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask as (B or 1, 1, T, T), True where a query may see a kernel, for tokens x (B, T, C).

    Boolean masks, and additive ones of 0 and -inf, may be (T, T), (B, T, T), (B, 1, T, T), (B, 1, 1, T) or, for key
    padding, (B, T). Where B = T > 1, a mask of two axes could be either and is an error.

    Raises:
        SpecError: If the mask has another shape, dtype or value.
        RuntimeError: In compiled and exported graphs, for an additive mask with other values than 0 and -inf.
    """
    B, T, _ = x.shape
    if mask.is_floating_point():
        mask = _from_additive(mask)
    if mask.dtype != torch.bool:
        raise SpecError(f"invalid attn_mask of dtype {mask.dtype}; expected bool, True where a query sees a kernel, or "
                        "floats that are 0 or -inf")  # fmt: skip
    if mask.ndim == 2 and mask.shape[0] == mask.shape[1] == B > 1:
        raise SpecError(f"invalid attn_mask of shape ({T}, {T}) for a batch of {B}, which could be one of queries and "
                        f"kernels or of images and kernels; expected (1, {T}, {T}) or ({B}, 1, 1, {T})")  # fmt: skip
    shaped = _shaped(mask, T)
    if shaped.ndim != 4 or shaped.shape[0] not in (1, B) or shaped.shape[1] != 1 or shaped.shape[3] != T \
            or shaped.shape[2] not in (1, T):  # fmt: skip
        raise SpecError(
            f"invalid attn_mask of shape {tuple(mask.shape)}; expected ({T}, {T}), ({B}, {T}), ({B}, {T}, {T}), "
            f"({B}, 1, 1, {T}) or ({B}, 1, {T}, {T}); a mask per head is not supported"
        )
    return shaped.expand(-1, -1, T, -1)


def _shaped(mask: Tensor, tokens: int) -> Tensor:
    """Return the mask with four axes."""
    if mask.ndim == 2:
        return mask[None, None] if mask.shape[0] == tokens else mask[:, None, None]
    return mask[:, None] if mask.ndim == 3 else mask


def _from_additive(mask: Tensor) -> Tensor:
    """Return an additive mask as booleans. Raises SpecError for values other than 0 and -inf; a graph, whose recording
    knows no values, checks them when it runs."""
    visible = mask == 0
    valid = (visible | (mask == -torch.inf)).all()
    if recorded():
        torch._assert_async(valid, OTHER_VALUES)  # torch._assert, its public form, stops a graph
    elif not mask.is_meta and not bool(untransformed(valid).all()):
        raise SpecError(OTHER_VALUES)
    return visible


OTHER_VALUES = (
    "invalid attn_mask with values other than 0 and -inf; expected visibility: a bias belongs to position=relative"
)
