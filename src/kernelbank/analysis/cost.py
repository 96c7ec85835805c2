"""The cost of a record and of a backbone in closed form: nothing is built and torch is not imported.

What is counted is the plain definition (design 1.3): only visible kernels, each generated where the definition
generates it. One multiply-add is one MAC. Biases, sums and maxima are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kernelbank.analysis.host import Host
from kernelbank.atlas import Skeleton
from kernelbank.inventory import Grid, inventory, reduced
from kernelbank.spec import (
    STEPS,
    Box,
    Dynamic,
    Full,
    Mean,
    MixerSpec,
    Own,
    Pool,
    Predict,
    Project,
    SpecError,
    Static,
    TwoStep,
    read_mlps,
    read_stages,
)

LAYER_NORM, BATCH_NORM = 3, 1
"""Multiplies per element: the square, 1/std and the affine; in evaluation BatchNorm is one scale."""


@dataclass(frozen=True)
class Cost:
    """What one image costs. Costs add.

    params: learned numbers (no buffers). macs: multiply-adds of all matrix products and convolutions.
    macs_modules: those that a counter of module calls sees, so without the two attention products, without
    kernels mixed or applied by a function, without p k, E and F (MMClassification until 2023, systems.md 1.1).
    multiplies: elementwise: scales, divisions, activations, norms (evaluation mode).
    """

    params: int = 0
    macs: int = 0
    macs_modules: int = 0
    multiplies: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.macs_modules + other.macs_modules,
            self.multiplies + other.multiplies,
        )


def _module(macs: int) -> Cost:
    return Cost(macs=macs, macs_modules=macs)


def _product(macs: int) -> Cost:
    return Cost(macs=macs)


def _scale(multiplies: int) -> Cost:
    return Cost(multiplies=multiplies)


def cost(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0, qk_norm: bool = False) -> Cost:
    """The cost of one mixer. Raises SpecError where `inventory` does, and for a shift that still alternates."""
    tensors = inventory(spec, dim, num_heads, grid, prefix, qk_norm)
    host = Host(spec, dim, num_heads, grid, prefix)
    params = sum(tensor.numel for tensor in tensors if not tensor.buffer)
    qk = _scale(LAYER_NORM * (host.tokens * dim + host.kernels * host.taps)) if qk_norm else Cost()
    return sum([Cost(params=params), qk, *_frame(host), *_bank(host), *_mix(host), *_kernel(host)], Cost())


def _frame(host: Host) -> Iterator[Cost]:
    if host.spec.frame != "bare":
        yield _module(2 * host.tokens * host.dim**2)
    if host.spec.frame == "bn_relu":
        yield _scale(3 * BATCH_NORM * host.tokens * host.dim)


def _bank(host: Host) -> Iterator[Cost]:
    """The weight generator; static kernels are there already."""
    spec, bank = host.spec, host.spec.bank
    if not isinstance(bank, Dynamic):
        return
    width, weights = host.dim, host.taps + (host.dim if isinstance(spec.kernel, TwoStep) else 0)
    if bank.stride > 1:
        yield _scale((host.kernels - host.prefix) * host.dim)
    if bank.r is not None:
        width = reduced(host.dim, bank.r)
        yield _module(host.generated * host.dim * width)
        if spec.frame == "bn_relu":
            yield _scale(BATCH_NORM * host.generated * width)
    yield _module(host.generated * width * weights)
    if bank.squash != "identity":
        yield _scale(host.generated * weights)


def _mix(host: Host) -> Iterator[Cost]:
    spec = host.spec
    match spec.mix:
        case Project(r=r):
            yield _product(host.kernels * r * (host.taps + host.dim))
        case Mean() if isinstance(spec.bank, Dynamic) and not isinstance(spec.support, Own):
            yield _scale(host.mixed * host.taps)
        case Pool():
            yield _scale(host.mixed * host.dim)
        case Predict(r=r):
            width = host.dim
            yield _scale(host.dim + host.kernels)
            if r is not None:
                width = reduced(host.dim, r)
                yield _module(host.dim * width)
            yield _module(width * host.kernels)
            yield _product(host.kernels * (_weights(host) + (host.dim if spec.bias else 0)))


def _weights(host: Host) -> int:
    """The weights of one static one-step kernel."""
    if isinstance(host.spec.kernel, Full):
        return host.dim * (host.dim // host.groups) * host.spec.size**2
    return host.taps


def _kernel(host: Host) -> Iterator[Cost]:
    """The kernels applied to the positions. Taps that fall outside the grid count, as conv counters count padding."""
    spec, area = host.spec, host.spec.size**2
    applied = _module if isinstance(spec.bank, Static) and not isinstance(spec.mix, Predict) else _product
    match spec.kernel:
        case TwoStep():
            yield applied(host.pairs * host.dim * (area + 1))
            scaled = isinstance(spec.bank, Dynamic)
            steps = scaled + sum(STEPS[step.name].multiplies for step in spec.activation)
            yield _scale(host.pairs * host.heads * steps)
        case Full():
            yield applied(host.tokens * _weights(host))
        case _ if isinstance(spec.bank, Box):
            yield _scale(host.tokens * host.dim)
        case _:
            yield applied(host.tokens * host.dim * area)
            if spec.position == "relative":
                yield _product(host.pairs * host.dim)


# ---- backbones -------------------------------------------------------------------------------------------


def backbone_cost(
    skeleton: Skeleton, mixer: str, mlp: str, img_size: tuple[int, int], in_chans: int, num_classes: int
) -> Cost:
    """The cost of a backbone: `mixer` and `mlp` are records' texts, one or one a stage; mlp ``none`` removes it.

    num_classes=0 leaves out the head. Raises SpecError for sizes the patches do not fill.
    """
    if any(side < 1 or side % skeleton.patch_size for side in img_size):
        raise SpecError(f"img_size={img_size} is not legal; legal: multiples of the patch size {skeleton.patch_size}")
    parts = _backbone(skeleton, mixer, mlp, img_size=img_size, in_chans=in_chans, num_classes=num_classes)
    return sum(parts, Cost())


def _backbone(
    skeleton: Skeleton, mixer: str, mlp: str, *, img_size: tuple[int, int], in_chans: int, num_classes: int
) -> Iterator[Cost]:
    patch, dims, prefix = skeleton.patch_size, skeleton.dims, skeleton.prefix
    grid = (img_size[0] // patch, img_size[1] // patch)
    yield _linear(math.prod(grid), in_chans * patch**2, dims[0], bias=True)
    if skeleton.hierarchical:
        yield _layer_norm(math.prod(grid), dims[0])
    yield Cost(params=prefix * dims[0])
    if skeleton.pos_embed == "learn":
        yield Cost(params=(prefix + math.prod(grid)) * dims[0])
    mixers, mlps = read_stages(mixer, len(dims)), read_mlps(mlp, len(dims))
    for index, (dim, num_heads) in enumerate(zip(dims, skeleton.num_heads, strict=True)):
        if index:
            grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            yield _layer_norm(math.prod(grid), 4 * dims[index - 1])
            yield _linear(math.prod(grid), 4 * dims[index - 1], dim, bias=False)
        stage = _Stage(dim, num_heads, grid, prefix)
        for block in range(skeleton.depths[index]):
            yield from _block(mixers[index], mlps[index], block, stage)
    yield _layer_norm(prefix + math.prod(grid), dims[-1])
    if num_classes:
        yield _linear(1, dims[-1], num_classes, bias=True)


@dataclass(frozen=True)
class _Stage:
    dim: int
    num_heads: int
    grid: Grid
    prefix: int


def _block(mixer: MixerSpec, mlp: MixerSpec | None, index: int, stage: _Stage) -> Iterator[Cost]:
    """A block: a mixer in frame bn_relu has no norm before it, and BatchNorm before the MLP."""
    normed = mixer.frame == "bn_relu"
    positions = stage.prefix + math.prod(stage.grid)
    if not normed:
        yield _layer_norm(positions, stage.dim)
    yield cost(mixer.at_block(index), stage.dim, stage.num_heads, stage.grid, stage.prefix)
    if mlp is not None:
        yield _batch_norm(positions, stage.dim) if normed else _layer_norm(positions, stage.dim)
        yield cost(mlp.at_block(index), stage.dim, stage.num_heads, stage.grid, stage.prefix)


def _linear(positions: int, of: int, out: int, bias: bool) -> Cost:
    return Cost(params=of * out + (out if bias else 0)) + _module(positions * of * out)


def _layer_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=LAYER_NORM * positions * width)


def _batch_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=BATCH_NORM * positions * width)
