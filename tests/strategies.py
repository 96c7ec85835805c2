"""Random legal records and the hosts to run them in. A new activation step is drawn at once; values of the other axes
are listed here by hand, and test_paths fails when a word of an axis is never drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from kernelbank.spec import MixerSpec
from kernelbank.spec.axes import (
    All,
    Box,
    Channels,
    Depthwise,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    Mean,
    Neighborhood,
    NoPosition,
    Own,
    Pool,
    Predict,
    Project,
    Relative,
    Rope,
    Stack,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.pipeline import STEPS, Pipeline, Step, softmax

HALF = Channels(per=2)


@dataclass(frozen=True)
class Host:
    """Where a record is run in a test."""

    dim: int
    num_heads: int
    grid: tuple[int, int]
    prefix: int
    batch: int


Choose = Callable[[Sequence[Any]], Any]
"""Takes one of a sequence: `random.Random(seed).choice`, or a draw of hypothesis (which shrinks)."""

KERNELS = (TwoStep(), TwoStep(1), TwoStep(HALF), TwoStep(Channels()), Full(), Full(2), Full("host"), Full(HALF),
           Depthwise(), Depthwise(), Grouped(1), Grouped("host"), Grouped(HALF))  # fmt: skip


def choose_host(choose: Choose) -> Host:
    """A small host: square or not, a side of one, with or without prefix tokens."""
    grid = (choose(range(1, 6)), choose(range(1, 6)))
    return Host(choose((4, 8)), choose((1, 2)), grid, choose((0, 0, 1, 2)), choose((1, 2)))


def choose_pipeline(choose: Choose) -> Pipeline:
    """One to three steps, at most one batchnorm and one exp (two overflow), or a softmax."""
    if choose((True, False, False, False)):
        return softmax(choose((None, 0.5, 3.0)), choose(("kernels", "positions")))
    steps: list[Step] = []
    for _ in range(choose((1, 2, 3))):
        name = choose(sorted(STEPS))
        if name in ("batchnorm", "exp") and name in [step.name for step in steps]:
            continue
        positions = STEPS[name].normaliser and name != "batchnorm" and choose((True, False))
        argument = choose((0.5, -1.5)) if name == "scale" else None
        steps.append(Step(name, argument, "positions" if positions else "kernels"))
    return tuple(steps)


def _choose_support(choose: Choose, two_step: bool, paddable: bool) -> All | Window | Dilated | Neighborhood | Own:
    match choose(("all", "window", "window", "grid", "neighborhood", "self")):
        case "window":
            M = choose((2, 3, 4))
            pad = choose(("masked", "mmpretrain", "timm")) if paddable else "masked"
            return Window(M, choose(range(M)), pad)
        case "grid":
            return Dilated(choose((2, 3, 4)))
        case "neighborhood":
            return Neighborhood(choose((3, 5)))
        case "self" if not two_step:
            return Own()
        case _:
            return All()


def choose_spec(choose: Choose) -> MixerSpec:
    """A legal record, resolved for a block."""
    kernel = choose(KERNELS)
    cells = {"kernel": kernel, "frame": choose(("linear", "bn_relu", "bare")), "bias": choose((True, False))}
    if kernel == Grouped(1) and choose((True, False)):
        cells |= {"bank": Box(), "support": All(), "mix": Mean(), "size": 3, "activation": (), "position": NoPosition()}
    elif isinstance(kernel, Full) or choose((True, False, False, False)):
        cells |= _choose_static(choose, isinstance(kernel, TwoStep))
    else:
        cells |= _choose_dynamic(choose, kernel, cells["frame"])
        if isinstance(kernel, TwoStep) and cells["frame"] == "linear" and choose((True, False)):
            norm = choose(("layernorm", "rmsnorm", "l2"))
            cells["kernel"] = TwoStep(kernel.heads, norm, choose(("fixed", "learned")))
    return MixerSpec(**cells)


def _choose_static(choose: Choose, two_step: bool) -> dict[str, Any]:
    K = choose((2, 3, Channels()) if two_step else (1, 2, 3))
    predict = Predict(choose(("softmax", "sigmoid")), choose((1.0, 4.0)), choose((None, 2)))
    mix = Stack() if two_step else Mean() if K == 1 else predict
    activation = choose_pipeline(choose) if two_step else ()
    return {"bank": Static(K), "support": All(), "mix": mix, "size": choose((1, 3)), "activation": activation,
            "position": NoPosition()}  # fmt: skip


def _choose_dynamic(choose: Choose, kernel: Any, frame: str) -> dict[str, Any]:
    two_step, size = isinstance(kernel, TwoStep), choose((1, 1, 3))
    bank = Dynamic(choose((None, None, 2)), choose(("identity", "identity", "sigmoid", "tanh")), choose((1, 1, 1, 2)))
    mix = choose((Stack(), Stack(), Project(3), Project(2, True)) if two_step else (Mean(), Mean(), Pool()))
    free = bank.stride == 1 and not isinstance(mix, Project)
    support = _choose_support(choose, two_step, size == 1 and frame != "bn_relu") if free else All()
    located = free and (isinstance(mix, Stack) or (isinstance(kernel, Depthwise) and isinstance(mix, Mean)))
    position = choose((NoPosition(), Relative())) if located else NoPosition()
    turns = located and size == 1 and kernel == TwoStep(1) and getattr(support, "pad", "masked") == "masked"
    if turns and choose((True, True, False)):
        position = choose((Rope(), Rope(100, "half", "unit"), Rope(50, "half", axes="xy", origin=1, side=3)))
    activation = choose_pipeline(choose) if two_step else ()
    return {"bank": bank, "support": support, "mix": mix, "size": size, "activation": activation, "position": position}


@st.composite
def specs(draw: st.DrawFn) -> MixerSpec:
    """Legal records for hypothesis."""
    return choose_spec(lambda options: draw(st.sampled_from(options)))


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    """Hosts for hypothesis."""
    return choose_host(lambda options: draw(st.sampled_from(options)))
