"""A spec as the paper's chain - static conv, dynamic conv, activation, dynamic conv, static conv - and the bank that
feeds it: the data behind the text diagram and the figure. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kernelbank.analysis.host import Host
from kernelbank.spec import (
    All,
    Box,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    Mean,
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
from kernelbank.spec.pipeline import show_pipeline


@dataclass(frozen=True)
class Link:
    """One step of the chain: what it does, the shape of its output (with the largest number of kernels that a position
    sees), and the letter of the kernels that the bank feeds it."""

    kind: Literal["static", "dynamic", "activation"]
    title: str
    detail: str
    shape: tuple[int, ...]
    kernels: str = ""


@dataclass(frozen=True)
class BankText:
    """Where the kernels come from, in lines of text; `reads` is the index of the link in front of which the bank reads
    the features, None if it reads none."""

    title: str
    lines: tuple[str, ...]
    reads: int | None


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text: ``196 × 384``."""
    return " × ".join(str(side) for side in shape)


def chain(host: Host) -> tuple[Link, ...]:
    """Return the links from the input of the mixer to its output."""
    return tuple(_links(host))


def bank(host: Host) -> BankText:
    """Return the kernel bank and what happens to its kernels before a position uses them."""
    spec = host.spec
    reads = 1 if spec.frame == "bn_relu" else 0
    match spec.bank:
        case Dynamic():
            return BankText("dynamic bank", (*_generated(host), *_selected(host)), reads)
        case Static() if isinstance(spec.mix, Predict):
            return BankText("static bank", (_learned(host), *_predicted(host, spec.mix)), reads)
        case Static():
            return BankText("static bank", (_learned(host), "shared by all images"), None)
        case _:
            fixed = ("the mean of the taps inside the grid", "minus the centre; nothing is learned")
            return BankText("no bank", fixed, None)


# ---- links -----------------------------------------------------------------------------------------------


def _links(host: Host) -> Iterator[Link]:
    spec, features = host.spec, (host.tokens, host.dim)
    conv = f"{host.dim} → {host.dim}, 1 × 1"
    match spec.frame:
        case "linear":
            yield Link("static", "static conv q", conv, features)
        case "bn_relu":
            yield Link("static", "static conv q, BN, ReLU", conv, features)
    yield from _two_steps(host) if isinstance(spec.kernel, TwoStep) else _one_step(host)
    match spec.frame:
        case "linear":
            yield Link("static", "static conv out", conv, features)
        case "bn_relu":
            yield Link("static", "BN, ReLU, static conv out, BN", conv, features)


def _two_steps(host: Host) -> Iterator[Link]:
    spec, width = host.spec, host.dim // host.heads
    kind: Literal["static", "dynamic"] = "dynamic" if isinstance(spec.bank, Dynamic) else "static"
    scores = (host.heads, host.tokens, host.visible[1])
    match spec.position:
        case Relative():
            position = ", plus p"
        case Rope():
            position = ", q and k rotated"
        case _:
            position = ""
    if isinstance(spec.kernel, TwoStep) and spec.kernel.norm != "none":
        position += f", {spec.kernel.norm} of q and k"
    yield Link(kind, f"{kind} conv{position}", f"{width} → 1 per kernel, {spec.size} × {spec.size}", scores, "k")
    scores_text = f"on {host.heads} × {scores[-1]} scores per position"
    yield Link("activation", show_pipeline(spec.activation), scores_text, scores)
    yield Link(kind, f"{kind} conv", f"1 → {width} per kernel, 1 × 1", (host.tokens, host.dim), "v")


def _one_step(host: Host) -> Iterator[Link]:
    spec = host.spec
    fixed = isinstance(spec.bank, Box) or (isinstance(spec.bank, Static) and not isinstance(spec.mix, Predict))
    kind: Literal["static", "dynamic"] = "static" if fixed else "dynamic"
    position = ", plus Σ p k" if isinstance(spec.position, Relative) else ""
    letter = "W" if isinstance(spec.bank, Static) else "" if isinstance(spec.bank, Box) else "k"
    title = "fixed filter" if isinstance(spec.bank, Box) else f"{kind} conv"
    yield Link(kind, title + position, kernel_text(host), (host.tokens, host.dim), letter)


def kernel_text(host: Host) -> str:
    """Return the kernel's type and size in one line: ``depth-wise 384, 7 × 7``."""
    spec, size = host.spec, f"{host.spec.size} × {host.spec.size}"
    match spec.kernel:
        case TwoStep():
            width = host.dim // host.heads
            return f"{width} → 1, {size}, then 1 → {width}, 1 × 1"
        case Full():
            split = "" if host.groups == 1 else f" in {host.groups} groups"
            return f"full {host.dim} → {host.dim}{split}, {size}"
        case Grouped() if host.groups == 1:
            return f"one weight for {host.dim} channels, {size}"
        case Grouped():
            return f"{host.groups} weights for {host.dim} channels, {size}"
        case _:
            return f"depth-wise {host.dim}, {size}" + (" (a gate)" if spec.size == 1 else "")


# ---- bank ------------------------------------------------------------------------------------------------


def _generated(host: Host) -> Iterator[str]:
    spec, generator = host.spec, host.spec.bank
    assert isinstance(generator, Dynamic)
    source = "q" if spec.frame == "bn_relu" else "x"
    if generator.stride > 1:
        yield f"{source} averaged in {generator.stride} × {generator.stride} cells"
    if isinstance(spec.mix, Pool) and not isinstance(spec.support, Own):
        yield f"{source} averaged over {_regions(host)}"
    width = host.dim
    if generator.r is not None:
        width = max(1, host.dim // generator.r)
        yield f"static conv {host.dim} → {width}, {'BN, ' if spec.frame == 'bn_relu' else ''}ReLU"
    squash = "" if generator.squash == "identity" else f", {generator.squash}"
    value = f", v: {width} → {host.dim}" if isinstance(spec.kernel, TwoStep) else ""
    yield f"static conv k: {width} → {host.taps}{value}{squash}"
    per = "one per position" if generator.stride == 1 else "one per cell"
    yield f"{_plural(host.generated)}, {_per(host) if isinstance(spec.mix, Pool) else per}"


def _selected(host: Host) -> Iterator[str]:
    spec, (low, high) = host.spec, host.visible
    match spec.mix:
        case Project(r=r, shared=shared):
            yield f"mixed into {r} by {'E' if shared else 'E and F'}, learned"
        case Mean() if not isinstance(spec.support, Own):
            yield f"averaged over {_regions(host)}: {_plural(host.mixed)}"
        case _ if isinstance(spec.mix, Pool) or isinstance(spec.support, Own):
            return
        case _:
            seen = str(high) if low == high else f"{low} to {high}"
            yield f"a position sees {'all ' if high == host.kernels else ''}{seen}"


def _learned(host: Host) -> str:
    return f"{host.kernels} learned kernels" if host.kernels > 1 else "one learned kernel"


def _predicted(host: Host, mix: Predict) -> Iterator[str]:
    source = "q" if host.spec.frame == "bn_relu" else "x"
    through = "" if mix.r is None else f"{max(1, host.dim // mix.r)} → "
    tau = "" if mix.tau == 1 else f"(. / {mix.tau:g})"
    yield f"mean of {source}: {host.dim} → {through}{host.kernels}, {mix.gate}{tau}: π"
    yield "Σ π_m W_m: one kernel per image"


def _plural(count: int) -> str:
    return f"{count} kernel{'' if count == 1 else 's'}"


def _regions(host: Host) -> str:
    match host.spec.support:
        case All():
            return "the image"
        case Window(M=M):
            return f"each {M} × {M} window"
        case Dilated(M=M):
            return f"each dilated {M} × {M} grid"
        case Neighborhood(M=M):
            return f"each {M} × {M} neighborhood"
        case Own():
            return "itself"


def _per(host: Host) -> str:
    match host.spec.support:
        case All():
            return "one per image"
        case Window():
            return "one per window"
        case Dilated():
            return "one per dilated grid"
        case Neighborhood():
            return "one per neighborhood"
        case Own():
            return "one per position"
