"""The equation of a spec, composed from its cells: every cell contributes its own symbols. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernelbank.spec import (
    STEPS,
    All,
    Box,
    Depthwise,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    MixerSpec,
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
from kernelbank.spec.text import number, split, split_call


def equation(spec: MixerSpec) -> str:
    """Return the output o_i of the dynamic convolution(s) in one line; `definitions` explains its symbols."""
    if isinstance(spec.kernel, TwoStep):
        bias = " + b" if _biased(spec) else ""
        return f"o_i = Σ_{_over(spec)} {_tight(_activated(spec))} {_key(spec, 'v')}_j{bias}"
    return f"o_i = {_one_step(spec)}"


def definitions(spec: MixerSpec) -> tuple[str, ...]:
    """Return one line per symbol of the equation: the convs around it, where kernels come from, which ones are seen."""
    return (*_frame(spec), *_bank(spec), *_mix(spec), *_seen(spec), *_symbols(spec))


# ---- two steps -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    """Part of an equation; a loose one needs brackets before it is multiplied."""

    text: str
    loose: bool = False


def _tight(term: _Term) -> str:
    return f"({term.text})" if term.loose else term.text


def _biased(spec: MixerSpec) -> bool:
    """Whether the static kernels of two steps have biases, as fc1 and fc2 do."""
    static = isinstance(spec.bank, Static) and isinstance(spec.kernel, TwoStep)
    return static and spec.bias and spec.frame == "bare"


def _operand(spec: MixerSpec) -> str:
    return "x" if spec.frame == "bare" else "q"


def _key(spec: MixerSpec, name: str) -> str:
    return f"{name}'" if isinstance(spec.mix, Project) else name


def _over(spec: MixerSpec) -> str:
    return "j" if isinstance(spec.support, All) else "{j∈V(i)}"


def _count(spec: MixerSpec) -> str:
    """The symbol of n_i, the number of kernels that position i sees."""
    match spec.mix, spec.bank:
        case Project(r=r), _:
            return str(r)
        case _, Static(K=K):
            return str(K)
        case _:
            return "n_i" if isinstance(spec.support, (Window, Dilated)) else "n"


def _hat(spec: MixerSpec, name: str) -> str:
    """The symbol of a query or kernel, with a hat where it is normalised."""
    normed = isinstance(spec.kernel, TwoStep) and spec.kernel.norm != "none"
    return f"{name[0]}̂{name[1:]}" if normed else name


def _scaled(spec: MixerSpec, product: str) -> str:
    learned = isinstance(spec.kernel, TwoStep) and spec.kernel.scale == "learned"
    return f"τ {product}" if learned else f"{product} / √d"


def _score(spec: MixerSpec) -> _Term:
    operand, key = _hat(spec, _operand(spec)), _hat(spec, _key(spec, "k"))
    if isinstance(spec.position, Rope):
        return _Term(_scaled(spec, f"(R_i {operand}_i) (R_j {key}_j)ᵀ"), loose=True)
    product = f"{operand}_i {key}_jᵀ" if spec.size == 1 else f"Σ_t {operand}_{{i+t}} {key}_jtᵀ"
    scaled = product if isinstance(spec.bank, Static) else _scaled(spec, product)
    if isinstance(spec.position, Relative):
        return _Term(f"{scaled} + p_ij", loose=True)
    if _biased(spec):
        return _Term(f"{scaled} + c_j", loose=True)
    return _Term(scaled, loose=True)


def _activated(spec: MixerSpec) -> _Term:
    term = _score(spec)
    for step in split(show_pipeline(spec.activation), ","):
        term = _step(step, term, _count(spec))
    return term


def _step(step: str, term: _Term, count: str) -> _Term:
    """One step, as it is written in the spec, applied to a term."""
    call, at, _ = step.partition("@")
    word, argument = split_call("activation", call)
    axis, count = ("i", "m_j") if at else ("j", count)
    match word:
        case "identity":
            return term
        case "count":
            return _Term(f"{_tight(term)} / {count}", loose=True)
        case "sqrt_count":
            return _Term(f"{_tight(term)} / √{count}", loose=True)
        case "log_count":
            return _Term(f"{term.text} − log {count}", loose=True)
        case "scale":
            return _Term(f"{number(float(argument or 1))}·{_tight(term)}")
        case "softmax":
            return _Term(f"softmax_{axis}({_tight(term)} / {argument})" if argument else f"softmax_{axis}({term.text})")
        case _:
            normaliser = STEPS[word].normaliser
            return _Term(f"{word}_{axis}({term.text})" if normaliser else f"{word}({term.text})")


# ---- one step --------------------------------------------------------------------------------------------


def _one_step(spec: MixerSpec) -> str:
    operand, spatial = _operand(spec), spec.size > 1
    x, t = (f"{operand}_{{i+t}}", "t") if spatial else (f"{operand}_i", "")
    taps = "Σ_t " if spatial else ""
    match spec.bank, spec.mix:
        case Box(), _:
            return f"mean_t {operand}_{{i+t}} − {operand}_i"
        case Static(), Predict():
            bias = " + Σ_m π_m b_m" if spec.bias else ""
            return f"{taps}{_apply(spec, f'(Σ_m π_m W_m{t})', x)}{bias}"
        case Static(), _:
            return f"{taps}{_apply(spec, f'W_{t}' if t else 'W', x)}{' + b' if spec.bias else ''}"
        case _, Pool():
            index = ("" if isinstance(spec.support, All) else "i") + t
            bias = " + b" if spec.frame == "bn_relu" and spec.bias else ""
            return f"{taps}{_apply(spec, f'k_{index}' if index else 'k', x)}{bias}"
        case _:
            own = isinstance(spec.support, Own)
            kernel = f"k_i{t}" if own else f"mean_{_over(spec)} k_j{t}"
            position = f"p_ii {taps}k_i{t}" if own else f"Σ_{_over(spec)} p_ij {taps}k_j{t}"
            return f"{taps}{_apply(spec, kernel, x)}" + (
                f" + {position}" if isinstance(spec.position, Relative) else ""
            )


def _apply(spec: MixerSpec, kernel: str, x: str) -> str:
    """A full kernel is a matrix; every other kernel multiplies channel by channel."""
    return f"{kernel} {x}" if isinstance(spec.kernel, Full) else f"{x} ⊙ {kernel}"


# ---- definitions -----------------------------------------------------------------------------------------


def _frame(spec: MixerSpec) -> Iterator[str]:
    bias = " + b_q" if spec.bias else ""
    match spec.frame:
        case "linear":
            yield f"q_i = W_q x_i{bias};  y_i = W_o o_i + b_o"
        case "bn_relu":
            yield "q_i = ReLU(BN(W_q x_i));  y_i = BN(W_o ReLU(BN(o_i)))"
        case _:
            yield "y_i = o_i"


def _bank(spec: MixerSpec) -> Iterator[str]:
    match spec.bank:
        case Dynamic():
            yield from _generator(spec, spec.bank)
        case Static(K=K):
            letters = "k, v" if isinstance(spec.kernel, TwoStep) else "W"
            yield f"{letters}: learned, shared by all images" + ("" if K == 1 else f"; {K} kernels")
            if _biased(spec):
                yield "c, b: learned biases of the two steps"
        case _:
            yield "t runs over the taps inside the grid; nothing is learned"


def _generator(spec: MixerSpec, bank: Dynamic) -> Iterator[str]:
    source = "q" if spec.frame == "bn_relu" else "x"
    index = "_i" if isinstance(spec.support, Own) else "_j"
    fed = source + index
    if isinstance(spec.mix, Pool) and index == "_j":
        index = "" if isinstance(spec.support, All) else "_i"
        fed = f"mean_{_over(spec)} {source}_j"
    if bank.stride > 1:
        yield f"{source}_j: the mean over cell j of {bank.stride} × {bank.stride} positions"
    if bank.r is not None:
        reduced = f"BN(W_r {fed})" if spec.frame == "bn_relu" else f"W_r {fed}" + (" + b_r" if spec.bias else "")
        yield f"z{index} = ReLU({reduced}), {bank.r} times narrower"
        fed = f"z{index}"
    for letter in ("k", "v") if isinstance(spec.kernel, TwoStep) else ("k",):
        generated = f"W_{letter} {fed}" + (f" + b_{letter}" if spec.bias else "")
        generated = generated if bank.squash == "identity" else f"{bank.squash}({generated})"
        taps = f", {spec.size} × {spec.size} taps t" if spec.size > 1 and letter == "k" else ""
        yield f"{letter}{index} = {generated}{taps}"


def _mix(spec: MixerSpec) -> Iterator[str]:
    match spec.mix:
        case Project(r=r, shared=shared):
            yield f"k'_j = Σ_m E_mj k_m;  v'_j = Σ_m {'E' if shared else 'F'}_mj v_m;  j = 1 … {r}"
        case Predict(gate=gate, tau=tau, r=r):
            source = "q" if spec.frame == "bn_relu" else "x"
            bias, reduced_bias = (" + b_P", " + b_r") if spec.bias else ("", "")
            fed = f"mean_j {source}_j" if r is None else f"ReLU(P_r mean_j {source}_j{reduced_bias})"
            inside = f"P {fed}{bias}"
            yield f"π = {gate}({inside if tau == 1 else f'({inside}) / {number(tau)}'})"


def _seen(spec: MixerSpec) -> Iterator[str]:
    if not isinstance(spec.bank, Dynamic):
        return
    match spec.support:
        case Window(M=M, shift=shift, pad=pad):
            shifted = f"by {M // 2} in odd blocks" if shift == "alternate" else f"by {shift}"
            moved = "" if shift == 0 else f", windows shifted {shifted}"
            padded = "" if pad == "masked" else f"; windows that the grid does not fill are padded as in {pad}"
            yield f"V(i): the kernels of the {M} × {M} window of position i{moved}{padded}"
        case Dilated(M=M):
            yield f"V(i): kernels spread over the grid, those in steps of ⌈H / {M}⌉ rows and ⌈W / {M}⌉ columns from i"
        case Neighborhood(M=M):
            yield f"V(i): the {M} × {M} kernels around position i, shifted inward at borders"
        case Own():
            yield "each position uses its own kernel only"
        case All() if not isinstance(spec.mix, Project):
            yield "j: the kernels of all " + ("positions" if spec.bank.stride == 1 else "cells")


def _symbols(spec: MixerSpec) -> Iterator[str]:
    match spec.kernel:
        case TwoStep(heads=1):
            yield "one head: d = C"
        case TwoStep(heads=heads):
            yield f"in each of {'h' if heads == 'host' else heads} heads of d channels"
        case Full(groups=groups) if groups != 1:
            yield f"W is block-diagonal: {'h' if groups == 'host' else groups} groups of channels"
        case Grouped(G=G) if not isinstance(spec.bank, Box):
            yield f"⊙: the channels of each of {'h' if G == 'host' else G} groups share one weight per tap"
        case Depthwise():
            yield "⊙: channel by channel"
    if isinstance(spec.kernel, TwoStep):
        yield from _norms(spec.kernel)
    if isinstance(spec.position, Relative):
        steps = ", counted in these steps" if isinstance(spec.support, Dilated) else ""
        yield f"p_ij: learned, one value per head and offset i − j{steps}"
    if isinstance(spec.position, Rope):
        yield from _rotation(spec.position)
    counted = {step.axis for step in spec.activation if step.name in ("count", "sqrt_count", "log_count")}
    if "kernels" in counted and _count(spec).startswith("n"):
        yield f"{_count(spec)}: the number of kernels that position i sees"
    if "positions" in counted:
        yield "m_j: the number of positions that see kernel j"


_NORMS = {
    "layernorm": "after a LayerNorm over the d channels of a head", "l2": "divided by their lengths",
    "rmsnorm": "after an RMSNorm over the d channels of a head",
}  # fmt: skip


def _norms(kernel: TwoStep) -> Iterator[str]:
    if kernel.norm != "none":
        yield f"q̂, k̂: q and k {_NORMS[kernel.norm]}"
    if kernel.scale == "learned":
        yield "τ: learned, one per head, at most 100"


def _rotation(rope: Rope) -> Iterator[str]:
    pairs = "(2k, 2k + 1)" if rope.layout == "interleaved" else "(k, k + d/2)"
    first, second = ("y", "x") if rope.axes == "yx" else ("x", "y")
    yield f"R_i: rotates channels {pairs} by {first}_i ω_k, then by {second}_i ω_k;  ω_k = {number(rope.theta)}^(−4k/d)"
    if rope.coordinates == "unit":
        yield "y_i, x_i: 2π times the centre of position i on an image from −1 to 1"
    else:
        first_index = f", counted from {rope.origin}" if rope.origin else ""
        scaled = "" if rope.side == "grid" else f", times {rope.side} / H and {rope.side} / W"
        yield f"y_i, x_i: the row and column of position i{first_index}{scaled}"
    yield "prefix tokens are not rotated"
