"""The cost of a spec and of a model in closed form: nothing is built and torch is not imported.

The plain definition is counted: only the kernels that a position sees, each generated once. One multiply-add is one
MAC. Biases, sums and maxima are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from kernelbank.analysis.host import Host
from kernelbank.model import ModelSpec, Stage, SwinTrunk, Trunk, ViTTrunk
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
    Relative,
    Rope,
    Static,
    TwoStep,
)
from kernelbank.spec.inventory import Grid, inventory, reduced

LAYER_NORM, BATCH_NORM, ROTATION = 3, 1, 2
"""Multiplies per element: the square, 1/std and the affine; in evaluation mode BatchNorm is one scale; by the cosine
and the sine."""


@dataclass(frozen=True)
class Cost:
    """The cost of one image. Costs can be added.

    Args:
        params: Learned parameters, without buffers.
        macs: Multiply-adds of all matrix products and convolutions.
        macs_modules: The multiply-adds that a counter of module calls sees, as MMClassification's did until 2023:
            without the two products of attention, kernels that a function mixes or applies, p k, E and F.
        multiplies: Elementwise multiplications in evaluation mode: scales, divisions, activations, norms.
        activations: Elements that matrix products and convolutions write (timm's macts; Radosavovic et al., arXiv
            2003.13678).
    """

    params: int = 0
    macs: int = 0
    macs_modules: int = 0
    multiplies: int = 0
    activations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def parameter_bytes(self, itemsize: int = 4) -> int:
        """Return the bytes of the parameters at `itemsize` bytes per parameter (4: float32)."""
        return self.params * itemsize

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Return the bytes of the activations of one image at `itemsize` bytes per element."""
        return self.activations * itemsize


def _module(macs: int, written: int) -> Cost:
    """A matrix product or convolution inside a module, and the elements that it writes."""
    return Cost(macs=macs, macs_modules=macs, activations=written)


def _product(macs: int, written: int) -> Cost:
    """A matrix product or convolution called as a function."""
    return Cost(macs=macs, activations=written)


def _scale(multiplies: int) -> Cost:
    return Cost(multiplies=multiplies)


def cost(spec: MixerSpec, dim: int, num_heads: int, grid: Grid, prefix: int = 0) -> Cost:
    """Return the cost of one mixer. Raises: SpecError: As `inventory`, and if the shift depends on the block."""
    tensors = inventory(spec, dim, num_heads, grid, prefix)
    host = Host(spec, dim, num_heads, grid, prefix)
    params = sum(tensor.numel for tensor in tensors if not tensor.buffer)
    return sum([Cost(params=params), *_frame(host), *_bank(host), *_mix(host), *_kernel(host)], Cost())


def _frame(host: Host) -> Iterator[Cost]:
    if host.spec.frame != "bare":
        yield _module(2 * host.tokens * host.dim**2, 2 * host.tokens * host.dim)
    if host.spec.frame == "bn_relu":
        yield _scale(3 * BATCH_NORM * host.tokens * host.dim)


def _bank(host: Host) -> Iterator[Cost]:
    """The weight generator of a dynamic bank; a static bank costs nothing."""
    spec, bank = host.spec, host.spec.bank
    if not isinstance(bank, Dynamic):
        return
    width, weights = host.dim, host.taps + (host.dim if isinstance(spec.kernel, TwoStep) else 0)
    if bank.stride > 1:
        yield _scale((host.kernels - host.prefix) * host.dim)
    if bank.r is not None:
        width = reduced(host.dim, bank.r)
        yield _module(host.generated * host.dim * width, host.generated * width)
        if spec.frame == "bn_relu":
            yield _scale(BATCH_NORM * host.generated * width)
    yield _module(host.generated * width * weights, host.generated * weights)
    if bank.squash != "identity":
        yield _scale(host.generated * weights)


def _mix(host: Host) -> Iterator[Cost]:
    spec = host.spec
    match spec.mix:
        case Project(r=r):
            yield _product(host.kernels * r * (host.taps + host.dim), r * (host.taps + host.dim))
        case Mean() if isinstance(spec.bank, Dynamic) and not isinstance(spec.support, Own):
            yield _scale(host.mixed * host.taps)
        case Pool():
            yield _scale(host.mixed * host.dim)
        case Predict(r=r):
            width = host.dim
            yield _scale(host.dim + host.kernels)
            if r is not None:
                width = reduced(host.dim, r)
                yield _module(host.dim * width, width)
            yield _module(width * host.kernels, host.kernels)
            mixed = _weights(host) + (host.dim if spec.bias else 0)
            yield _product(host.kernels * mixed, mixed)


def _weights(host: Host) -> int:
    """The weights of one static one-step kernel."""
    if isinstance(host.spec.kernel, Full):
        return host.dim * (host.dim // host.groups) * host.spec.size**2
    return host.taps


def _kernel(host: Host) -> Iterator[Cost]:
    """The kernels applied to the positions. Taps outside the grid count, as counters of convolutions count padding."""
    spec, area = host.spec, host.spec.size**2
    applied = _module if isinstance(spec.bank, Static) and not isinstance(spec.mix, Predict) else _product
    match spec.kernel:
        case TwoStep():
            yield applied(host.pairs * host.dim * (area + 1), host.pairs * host.heads + host.tokens * host.dim)
            if isinstance(spec.position, Rope):
                yield _scale(ROTATION * 2 * (host.tokens - host.prefix) * host.dim)
            if spec.kernel.norm != "none":
                yield _scale(LAYER_NORM * (host.tokens * host.dim + host.kernels * host.taps))
            scaled = isinstance(spec.bank, Dynamic)
            steps = scaled + sum(STEPS[step.name].multiplies for step in spec.activation)
            yield _scale(host.pairs * host.heads * steps)
        case Full():
            yield applied(host.tokens * _weights(host), host.tokens * host.dim)
        case _ if isinstance(spec.bank, Box):
            yield _scale(host.tokens * host.dim)
        case _:
            yield applied(host.tokens * host.dim * area, host.tokens * host.dim)
            if isinstance(spec.position, Relative):
                yield _product(host.pairs * host.dim, host.tokens * host.dim)


# ---- backbones -------------------------------------------------------------------------------------------


def model_cost(spec: ModelSpec) -> Cost:
    """Return the cost of a model on one image, its head included.

    Raises:
        SpecError: If the trunk is a stock model of timm, or the specs do not fit it.
    """
    return sum([*_embedding(spec), *_blocks(spec), *_head(spec)], Cost())


def _embedding(spec: ModelSpec) -> Iterator[Cost]:
    trunk, first = spec.trunk, spec.stages[0]
    positions = math.prod(first.grid)
    if isinstance(trunk, SwinTrunk):
        yield _linear(positions, spec.in_chans * math.prod(trunk.patch_size), first.dim, bias=True)
        yield _layer_norm(positions, first.dim)
        return
    assert isinstance(trunk, ViTTrunk)
    yield _linear(positions, spec.in_chans * math.prod(trunk.patch_size), first.dim, bias=not trunk.pre_norm)
    yield Cost(params=first.prefix * first.dim)
    if trunk.pos_embed == "learn":
        yield Cost(params=(positions + (0 if trunk.no_embed_class else first.prefix)) * first.dim)
    if trunk.pre_norm:
        yield _layer_norm(first.prefix + positions, first.dim)


def _blocks(spec: ModelSpec) -> Iterator[Cost]:
    merged = None
    for stage in spec.stages:
        if merged is not None:
            yield _layer_norm(math.prod(stage.grid), 4 * merged)
            yield _linear(math.prod(stage.grid), 4 * merged, stage.dim, bias=False)
        merged = stage.dim
        for index in range(stage.depth):
            yield from _block(stage, index, spec.trunk)


def _block(stage: Stage, index: int, trunk: Trunk) -> Iterator[Cost]:
    """A block: a mixer in frame bn_relu has no norm before it, and BatchNorm before the MLP."""
    mixer, mlp = stage.mixer.at_block(index), None if stage.mlp is None else stage.mlp.at_block(index)
    host = (stage.dim, stage.num_heads, stage.grid, stage.prefix)
    positions, norm_inside = stage.prefix + math.prod(stage.grid), mixer.frame == "bn_relu"
    if not norm_inside:
        yield _layer_norm(positions, stage.dim)
    yield cost(mixer, *host)
    if mlp is not None:
        yield _batch_norm(positions, stage.dim) if norm_inside else _layer_norm(positions, stage.dim)
        yield cost(mlp, *host)
    if isinstance(trunk, ViTTrunk) and trunk.init_values:
        branches = 1 if mlp is None else 2
        yield Cost(params=branches * stage.dim, multiplies=branches * positions * stage.dim)


def _head(spec: ModelSpec) -> Iterator[Cost]:
    trunk, last = spec.trunk, spec.stages[-1]
    positions = last.prefix + math.prod(last.grid)
    if isinstance(trunk, ViTTrunk):
        after_pooling = trunk.global_pool in ("avg", "avgmax", "max") if trunk.fc_norm is None else trunk.fc_norm
        if trunk.final_norm:
            yield _layer_norm(1 if after_pooling else positions, last.dim)
    else:
        yield _layer_norm(positions, last.dim)
    if spec.num_classes:
        yield _linear(1, last.dim, spec.num_classes, bias=True)


def _linear(positions: int, of: int, out: int, bias: bool) -> Cost:
    return Cost(params=of * out + (out if bias else 0)) + _module(positions * of * out, positions * out)


def _layer_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=LAYER_NORM * positions * width)


def _batch_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=BATCH_NORM * positions * width)
