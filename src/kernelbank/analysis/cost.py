"""The cost of a record and of a backbone in closed form: nothing is built and torch is not imported.

What is counted is the plain definition (design 1.3): only visible kernels, each generated where the definition
generates it. One multiply-add is one MAC. Biases, sums and maxima are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from kernelbank.analysis.host import Host
from kernelbank.atlas import MODELS, Skeleton, Stage
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
from kernelbank.spec.inventory import Grid, inventory, reduced
from kernelbank.text import suggest

LAYER_NORM, BATCH_NORM = 3, 1
"""Multiplies per element: the square, 1/std and the affine; in evaluation BatchNorm is one scale."""


@dataclass(frozen=True)
class Cost:
    """What one image costs. Costs add.

    params: learned numbers (no buffers). macs: multiply-adds of all matrix products and convolutions.
    macs_modules: those that a counter of module calls sees, so without the two attention products, without
    kernels mixed or applied by a function, without p k, E and F (MMClassification until 2023, systems.md 1.1).
    multiplies: elementwise: scales, divisions, activations, norms (evaluation mode).
    activations: numbers that matrix products and convolutions write (timm's macts; Radosavovic et al.,
    arXiv 2003.13678), what a backward keeps of them.
    """

    params: int = 0
    macs: int = 0
    macs_modules: int = 0
    multiplies: int = 0
    activations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def parameter_bytes(self, itemsize: int = 4) -> int:
        """Bytes of the parameters at `itemsize` bytes a number (4: float32)."""
        return self.params * itemsize

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Bytes of the activations of one image at `itemsize` bytes a number."""
        return self.activations * itemsize


def _module(macs: int, written: int) -> Cost:
    """A matrix product or convolution that a module call holds, and the numbers it writes."""
    return Cost(macs=macs, macs_modules=macs, activations=written)


def _product(macs: int, written: int) -> Cost:
    """One that a function holds."""
    return Cost(macs=macs, activations=written)


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
        yield _module(2 * host.tokens * host.dim**2, 2 * host.tokens * host.dim)
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
    """The kernels applied to the positions. Taps that fall outside the grid count, as conv counters count padding."""
    spec, area = host.spec, host.spec.size**2
    applied = _module if isinstance(spec.bank, Static) and not isinstance(spec.mix, Predict) else _product
    match spec.kernel:
        case TwoStep():
            yield applied(host.pairs * host.dim * (area + 1), host.pairs * host.heads + host.tokens * host.dim)
            scaled = isinstance(spec.bank, Dynamic)
            steps = scaled + sum(STEPS[step.name].multiplies for step in spec.activation)
            yield _scale(host.pairs * host.heads * steps)
        case Full():
            yield applied(host.tokens * _weights(host), host.tokens * host.dim)
        case _ if isinstance(spec.bank, Box):
            yield _scale(host.tokens * host.dim)
        case _:
            yield applied(host.tokens * host.dim * area, host.tokens * host.dim)
            if spec.position == "relative":
                yield _product(host.pairs * host.dim, host.tokens * host.dim)


# ---- backbones -------------------------------------------------------------------------------------------


def model_cost(name: str) -> Cost:
    """The cost of a registered model, 1000 classes. Raises SpecError for an unknown name."""
    if name not in MODELS:
        raise SpecError(f"unknown model {name!r}{suggest(name, MODELS)}; legal: {', '.join(MODELS)}")
    model = MODELS[name]
    size = (model.img_size, model.img_size)
    return backbone_cost(model.skeleton, model.mixer, model.mlp, size, 3, 1000)


def backbone_cost(
    skeleton: Skeleton, mixer: str, mlp: str, img_size: tuple[int, int], in_chans: int, num_classes: int
) -> Cost:
    """The cost of a backbone: `mixer` and `mlp` are records' texts, one or one a stage; mlp ``none`` removes it.

    num_classes=0 leaves out the head. Raises SpecError for sizes the patches do not fill.
    """
    parts = _backbone(skeleton, mixer, mlp, img_size=img_size, in_chans=in_chans, num_classes=num_classes)
    return sum(parts, Cost())


def _backbone(
    skeleton: Skeleton, mixer: str, mlp: str, *, img_size: tuple[int, int], in_chans: int, num_classes: int
) -> Iterator[Cost]:
    stages = skeleton.stages(img_size)
    first, last = stages[0], stages[-1]
    yield _linear(math.prod(first.grid), in_chans * skeleton.patch_size**2, first.dim, bias=True)
    if skeleton.hierarchical:
        yield _layer_norm(math.prod(first.grid), first.dim)
    yield Cost(params=first.prefix * first.dim)
    if skeleton.pos_embed == "learn":
        yield Cost(params=(first.prefix + math.prod(first.grid)) * first.dim)
    records = zip(read_stages(mixer, len(stages)), read_mlps(mlp, len(stages)), strict=True)
    merged = None
    for stage, (mixer_spec, mlp_spec) in zip(stages, records, strict=True):
        if merged is not None:
            yield _layer_norm(math.prod(stage.grid), 4 * merged)
            yield _linear(math.prod(stage.grid), 4 * merged, stage.dim, bias=False)
        merged = stage.dim
        for block in range(stage.depth):
            yield from _block(mixer_spec, mlp_spec, block, stage)
    yield _layer_norm(last.prefix + math.prod(last.grid), last.dim)
    if num_classes:
        yield _linear(1, last.dim, num_classes, bias=True)


def _block(mixer: MixerSpec, mlp: MixerSpec | None, index: int, stage: Stage) -> Iterator[Cost]:
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
    return Cost(params=of * out + (out if bias else 0)) + _module(positions * of * out, positions * out)


def _layer_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=LAYER_NORM * positions * width)


def _batch_norm(positions: int, width: int) -> Cost:
    return Cost(params=2 * width, multiplies=BATCH_NORM * positions * width)
