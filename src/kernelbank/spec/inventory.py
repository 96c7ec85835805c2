"""Every parameter and buffer of a spec by name and shape, read by the module, the cost and conversion. No torch.

C channels, h heads of d = C/h, K or n kernels, G groups, k the kernel size, r a reduction or rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kernelbank.errors import SpecError
from kernelbank.spec.arguments import COUNT, HOST, Channels
from kernelbank.spec.axes import (
    All,
    Box,
    Depthwise,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    Neighborhood,
    Own,
    Pool,
    Predict,
    Project,
    Relative,
    Rope,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.mixer_spec import MixerSpec

Grid = tuple[int, int]
Init = Literal["linear", "uniform", "zeros", "ones", "log_10"]


@dataclass(frozen=True)
class Tensor:
    """One parameter or buffer. `init` is its initialisation: ``linear`` is a truncated normal of standard deviation
    0.02 (timm's), ``uniform`` is uniform in +-1/sqrt(fan_in), ``zeros``, ``ones`` and ``log_10`` are constants."""

    name: str
    shape: tuple[int, ...]
    init: Init
    fan_in: int = 1
    buffer: bool = False

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def inventory(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0) -> tuple[Tensor, ...]:
    """Return every tensor of `spec` at `dim` channels, `num_heads` heads and an H x W `grid` after `prefix` tokens.

    Raises: SpecError: If the channels do not divide into the heads or groups, or if heads are no multiple of 4 channels
        wide for position rope.
    """
    check_host(dim, num_heads, grid, prefix)
    if isinstance(spec.position, Rope) and (width := dim // heads(spec, dim, num_heads)) % 4:
        raise SpecError(f"invalid heads of {width} channels for position={spec.position}; expected a multiple of 4")
    return tuple(_tensors(spec, dim, num_heads, grid, prefix))


def check_host(dim: int, num_heads: int, grid: Grid, prefix: int) -> None:
    """Raises: SpecError: If channels, heads or a side of the grid are no whole number >= 1, or the prefix none >= 0."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise SpecError(f"invalid grid={grid!r}; expected (height, width)")
    sizes = {"dim": dim, "num_heads": num_heads, "grid height": grid[0], "grid width": grid[1]}
    for name, value in sizes.items():
        if not COUNT.accepts(value):
            raise SpecError(f"invalid {name}={value!r}; expected {COUNT.expected}")
    if prefix != 0 and not COUNT.accepts(prefix):
        raise SpecError(f"invalid prefix={prefix!r}; expected a whole number >= 0")


def reduced(dim: int, r: int) -> int:
    """Return the width of a bottleneck: max(1, C // r)."""
    return max(1, dim // r)


# ---- sizes -----------------------------------------------------------------------------------------------


def resolve(value: int | Channels | Literal["host"], dim: int, num_heads: int) -> int:
    """Return the number that ``host``, ``C/16`` or ``4C`` stands for."""
    if value == HOST:
        return num_heads
    return value.of(dim) if isinstance(value, Channels) else value


def _divide(dim: int, parts: int, what: str) -> int:
    if dim % parts:
        raise SpecError(f"invalid dim={dim}; expected a multiple of {parts}, the number of {what}")
    return parts


def heads(spec: MixerSpec, dim: int, num_heads: int) -> int:
    """Return h: the heads of the two_step argument, else `num_heads`. Raises: SpecError: If h does not divide `dim`."""
    count = resolve(spec.kernel.heads, dim, num_heads) if isinstance(spec.kernel, TwoStep) else num_heads
    return _divide(dim, count, "heads")


def groups(spec: MixerSpec, dim: int, num_heads: int) -> int:
    """Return the groups of a one-step kernel: of full, G of grouped, C of depthwise. Raises: SpecError: If they do not
    divide `dim`."""
    match spec.kernel:
        case Full(groups=count) | Grouped(G=count):
            return _divide(dim, resolve(count, dim, num_heads), "groups")
        case Depthwise() | TwoStep():
            return dim


def bank_size(spec: MixerSpec, dim: int, grid: Grid, prefix: int) -> int:
    """Return how many kernels the bank holds: K if static, one per prefix token and (pooled) cell if dynamic."""
    match spec.bank:
        case Static(K=K):
            return resolve(K, dim, 1)
        case Dynamic(stride=s):
            return prefix + math.ceil(grid[0] / s) * math.ceil(grid[1] / s)
        case Box():
            return 1


def is_sized(spec: MixerSpec) -> bool:
    """Return whether the shape of a tensor of `spec` depends on the grid: of a relative table, or of the matrices of
    `project`."""
    return isinstance(spec.position, Relative) or isinstance(spec.mix, Project)


def extent(spec: MixerSpec, grid: Grid) -> Grid:
    """Return a x b, the sides of what a position can see, in steps of the support; the relative table has
    (2a-1) x (2b-1) offsets."""
    match spec.support:
        case All():
            return grid
        case Window(M=M) | Dilated(M=M) | Neighborhood(M=M):
            return min(M, grid[0]), min(M, grid[1])
        case Own():
            return 1, 1


def taps(spec: MixerSpec, dim: int, num_heads: int) -> int:
    """Return the weights that the key generator emits per position: channels or groups times size^2, channel-major."""
    return (groups(spec, dim, num_heads) if isinstance(spec.kernel, Grouped) else dim) * spec.size**2


@dataclass(frozen=True)
class SizedSpec:
    """A spec at `dim` channels and `num_heads` heads."""

    spec: MixerSpec
    dim: int
    num_heads: int

    @property
    def heads(self) -> int:
        """h, the heads of a two_step kernel, else `num_heads`."""
        return heads(self.spec, self.dim, self.num_heads)

    @property
    def groups(self) -> int:
        """The groups of a one-step kernel."""
        return groups(self.spec, self.dim, self.num_heads)


# ---- the list --------------------------------------------------------------------------------------------


def _linear(name: str, out: int, of: int, bias: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, of), "linear", of)
    if bias:
        yield Tensor(f"{name}.bias", (out,), "zeros")


def _batch_norm(name: str, width: int) -> Iterator[Tensor]:
    yield from _affine(name, width)
    yield Tensor(f"{name}.running_mean", (width,), "zeros", buffer=True)
    yield Tensor(f"{name}.running_var", (width,), "ones", buffer=True)


def _affine(name: str, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), "ones")
    yield Tensor(f"{name}.bias", (width,), "zeros")


def _tensors(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int) -> Iterator[Tensor]:
    normed = spec.frame == "bn_relu"
    if spec.frame != "bare":
        yield from _linear("q", dim, dim, spec.bias and not normed)
    if normed:
        yield from _batch_norm("q_norm", dim)
    if isinstance(spec.kernel, TwoStep):
        yield from _head_norms(spec.kernel, heads(spec, dim, num_heads), dim)

    match spec.bank:
        case Dynamic():
            yield from _generator(spec, dim, num_heads)
        case Static() if isinstance(spec.kernel, TwoStep):
            yield from _static_two_step(spec, dim, num_heads, grid)
        case Static():
            yield from _static_one_step(spec, dim, num_heads, grid)

    if isinstance(spec.mix, Project):
        kernels = bank_size(spec, dim, grid, prefix)
        for name in ("E",) if spec.mix.shared else ("E", "F"):
            yield Tensor(name, (kernels, spec.mix.r), "uniform", spec.mix.r)
    if isinstance(spec.mix, Predict):
        yield from _predictor(spec, spec.mix, dim, grid)

    if any(step.name == "batchnorm" for step in spec.activation):
        yield from _batch_norm("activation_norm", heads(spec, dim, num_heads))
    if isinstance(spec.position, Relative):
        h, (a, b) = heads(spec, dim, num_heads), extent(spec, grid)
        yield Tensor("table.weight", (h, 2 * a - 1, 2 * b - 1), "linear")
        if prefix:
            yield Tensor("table.prefix", (h, 3), "linear")

    if normed:
        yield from _batch_norm("out_norm", dim)
    if spec.frame != "bare":
        yield from _linear("out", dim, dim, not normed)
    if normed:
        yield from _batch_norm("last_norm", dim)


def _head_norms(kernel: TwoStep, h: int, dim: int) -> Iterator[Tensor]:
    """The norms of queries and kernels per head, and the learned scale of the scores."""
    for name in ("q_norm", "k_norm"):
        if kernel.norm in ("layernorm", "rmsnorm"):
            yield Tensor(f"{name}.weight", (dim // h,), "ones")
        if kernel.norm == "layernorm":
            yield Tensor(f"{name}.bias", (dim // h,), "zeros")
    if kernel.scale == "learned":
        yield Tensor("logit_scale", (h,), "log_10")


def _generator(spec: MixerSpec, dim: int, num_heads: int) -> Iterator[Tensor]:
    assert isinstance(spec.bank, Dynamic)
    normed, width = spec.frame == "bn_relu", dim
    if spec.bank.r is not None:
        width = reduced(dim, spec.bank.r)
        yield from _linear("reduce", width, dim, spec.bias and not normed)
        if normed:
            yield from _batch_norm("reduce_norm", width)
    if isinstance(spec.kernel, TwoStep):
        heads(spec, dim, num_heads)
    yield from _linear("key", taps(spec, dim, num_heads), width, spec.bias)
    if isinstance(spec.kernel, TwoStep):
        yield from _linear("value", dim, width, spec.bias)
    if normed and isinstance(spec.mix, Pool) and spec.bias:
        yield Tensor("bias", (dim,), "zeros")


def _static_two_step(spec: MixerSpec, dim: int, num_heads: int, grid: Grid) -> Iterator[Tensor]:
    h, K, k = heads(spec, dim, num_heads), bank_size(spec, dim, grid, 0), spec.size
    biased = spec.bias and spec.frame == "bare"
    if h == k == 1:  # the kernels are two linear layers, an FFN's
        yield from _linear("key", K, dim, biased)
        yield from _linear("value", dim, K, biased)
        return
    yield Tensor("key.weight", (h, K, dim // h, k, k), "linear", dim // h * k * k)
    if biased:
        yield Tensor("key.bias", (h, K), "zeros")
    yield Tensor("value.weight", (h, dim // h, K), "linear", K)
    if biased:
        yield Tensor("value.bias", (dim,), "zeros")


def _static_one_step(spec: MixerSpec, dim: int, num_heads: int, grid: Grid) -> Iterator[Tensor]:
    K, k, g = bank_size(spec, dim, grid, 0), spec.size, groups(spec, dim, num_heads)
    out, of = (dim, dim // g) if isinstance(spec.kernel, Full) else (g if isinstance(spec.kernel, Grouped) else dim, 1)
    yield Tensor("weight", (K, out, of, k, k), "uniform", of * k * k)
    if spec.bias:
        yield Tensor("bias", (K, dim), "uniform", of * k * k)


def _predictor(spec: MixerSpec, mix: Predict, dim: int, grid: Grid) -> Iterator[Tensor]:
    width = dim
    if mix.r is not None:
        width = reduced(dim, mix.r)
        yield from _linear("reduce", width, dim, spec.bias)
    yield from _linear("predict", bank_size(spec, dim, grid, 0), width, spec.bias)
