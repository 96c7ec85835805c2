"""The activation between the two steps: an ordered tuple of steps, their roles and their text. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kernelbank.errors import SpecError
from kernelbank.spec.text import finite, number, read_number, split, split_call
from kernelbank.text import suggest

Role = Literal["normalisation", "communication", "non-linearity"]
ROLES: tuple[Role, ...] = ("normalisation", "communication", "non-linearity")


@dataclass(frozen=True)
class StepKind:
    """An activation step as data.

    Args:
        equation: What the step makes of the scores a over the n visible kernels.
        roles: Its roles in the sense of the paper's section 5.2.
        normaliser: Whether it normalises over an axis, so that ``@positions`` is allowed.
        multiplies: Multiplications per score; a division counts as one, sums, maxima and the exponential as none.
    """

    equation: str
    roles: tuple[Role, ...] = ()
    normaliser: bool = False
    multiplies: int = 0


def _pointwise(equation: str, multiplies: int = 0) -> StepKind:
    return StepKind(equation, ("non-linearity",), multiplies=multiplies)


def _normaliser(equation: str, multiplies: int, *roles: Role) -> StepKind:
    return StepKind(equation, roles, True, multiplies)


# ops/activation.py has the function of each step under the same name; a test compares the two tables.
STEPS: dict[str, StepKind] = {
    "identity": StepKind("a"),
    "relu": _pointwise("max(a, 0)"),
    "relu2": _pointwise("max(a, 0)^2", 1),
    "cube": _pointwise("a^3", 2),
    "gelu": _pointwise("a Phi(a)", 1),
    "gelu_tanh": _pointwise("a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))) / 2", 7),
    "quick_gelu": _pointwise("a sigmoid(1.702 a)", 2),
    "silu": _pointwise("a sigmoid(a)", 1),
    "exp": _pointwise("exp(a)"),
    "sigmoid": _pointwise("1 / (1 + exp(-a))", 1),
    "softplus": _pointwise("log(1 + exp(a))"),
    "tanh": _pointwise("tanh(a)", 1),
    "log_count": StepKind("a - log n"),
    "scale": StepKind("x a", multiplies=1),
    "count": _normaliser("a / n", 1),
    "sqrt_count": _normaliser("a / sqrt(n)", 1),
    "l1": _normaliser("a / max(sum |a|, eps)", 1, "normalisation", "communication"),
    "l2": _normaliser("a / max(sqrt(sum a^2), eps)", 2, "normalisation", "communication"),
    "rmsnorm": _normaliser("a / sqrt(mean a^2 + eps)", 2, "normalisation", "communication"),
    "center": _normaliser("a - mean a", 0, "communication"),
    "layernorm": _normaliser("(a - mean a) / sqrt(var a + eps)", 2, "normalisation", "communication"),
    "batchnorm": StepKind("g (a - mean_b a) / sqrt(var_b a + eps) + b, per head", ("normalisation",), multiplies=1),
}


@dataclass(frozen=True)
class Step:
    """One step of a pipeline. `axis` is what a normaliser runs over: the kernels that a position sees, or the
    positions that see a kernel (``@positions``). Only ``scale`` takes an argument.

    Raises: SpecError: If the step is unknown, or its argument or axis is invalid.
    """

    name: str
    argument: float | None = None
    axis: Literal["kernels", "positions"] = "kernels"

    def __post_init__(self) -> None:
        if self.name not in STEPS:
            raise SpecError(f"invalid activation: unknown step {self.name!r}{suggest(self.name, [*STEPS, 'softmax'])}; "
                            f"expected one of {', '.join(STEPS)}, softmax")  # fmt: skip
        if self.name == "scale":
            value = self.argument
            if not finite(value) or not value:
                raise SpecError(f"invalid activation=scale({value}); expected scale(x), x finite and non-zero")
            object.__setattr__(self, "argument", float(value))
        elif self.argument is not None:
            raise SpecError(f"invalid activation={self.name}({self.argument}); expected no argument")
        if self.axis not in ("kernels", "positions"):
            raise SpecError(f"invalid activation={self.name}@{self.axis}; expected @positions or nothing")
        if self.axis == "positions" and not STEPS[self.name].normaliser:
            normalisers = ", ".join(name for name, kind in STEPS.items() if kind.normaliser)
            raise SpecError(f"invalid activation={self.name}@positions; expected @positions on one of {normalisers}")

    @property
    def roles(self) -> frozenset[Role]:
        """The roles this step plays; over positions a normaliser does not let kernels communicate."""
        roles = frozenset(STEPS[self.name].roles)
        return roles - {"communication"} if self.axis == "positions" else roles

    def __str__(self) -> str:
        argument = "" if self.argument is None else f"({number(self.argument)})"
        return self.name + argument + ("@positions" if self.axis == "positions" else "")


Pipeline = tuple[Step, ...]
EXP, L1 = Step("exp"), Step("l1")


def softmax(tau: float | None = None, axis: Literal["kernels", "positions"] = "kernels") -> Pipeline:
    """Return softmax(a / tau) as the steps scale(1/tau), exp, l1. Raises: SpecError: If tau is not finite and > 0."""
    if tau is None:
        return (EXP, Step("l1", axis=axis))
    if not (finite(tau) and tau > 0 and finite(1 / tau)):
        raise SpecError(f"invalid activation=softmax({tau}); expected softmax(tau), tau finite and > 0")
    return (Step("scale", 1 / tau), EXP, Step("l1", axis=axis))


def roles(pipeline: Pipeline) -> tuple[Role, ...]:
    """Return the roles of a pipeline, in the paper's order."""
    played = frozenset[Role]().union(*(step.roles for step in pipeline))
    return tuple(role for role in ROLES if role in played)


def _read_step(text: str) -> Pipeline:
    head, at, axis = text.partition("@")
    if at and axis != "positions":
        raise SpecError(f"invalid activation={text}: unknown axis @{axis}; expected @positions, on a normaliser")
    word, inside = split_call("activation", head)
    if not word:
        raise SpecError(f"invalid activation={text}; expected a step that starts with its name")
    values = [] if inside is None else split(inside, ",")
    if len(values) > 1 or "" in values:
        raise SpecError(f"invalid activation={text}; expected at most one argument, which is not empty")
    try:
        value = read_number(values[0]) if values else None
    except ValueError:
        raise SpecError(f"invalid activation={text}; expected a number as its argument") from None
    over: Literal["kernels", "positions"] = "positions" if at else "kernels"
    return softmax(value, over) if word == "softmax" else (Step(word, value, over),)


def read_pipeline(text: str) -> Pipeline:
    """Read comma-separated steps; ``none`` is the empty pipeline. Raises: SpecError: If the text is invalid."""
    if text == "none":
        return ()
    steps = split(text, ",")
    if "" in steps:
        raise SpecError(f"invalid activation={text}: empty step; expected steps separated by single commas")
    return tuple(step for part in steps for step in _read_step(part))


def show_pipeline(pipeline: Pipeline) -> str:
    """Return the shortest text that reads back to the same steps: exp,l1 is written softmax."""
    return ",".join(_show_steps(pipeline)) or "none"


def _show_steps(steps: Pipeline) -> Iterator[str]:
    while steps:
        for tau, rest in _softmax_readings(steps):
            if softmax(tau, steps[rest - 1].axis) == steps[:rest]:
                at = "@positions" if steps[rest - 1].axis == "positions" else ""
                yield "softmax" + ("" if tau is None else f"({number(tau)})") + at
                break
        else:
            rest = 1
            yield str(steps[0])
        steps = steps[rest:]


def _softmax_readings(steps: Pipeline) -> Iterator[tuple[float | None, int]]:
    """The ways in which the first steps may be a softmax: its tau, and the number of steps it covers."""
    if len(steps) >= 2 and steps[0] == EXP and steps[1].name == "l1":
        yield None, 2
    if len(steps) >= 3 and (x := steps[0].argument) and x > 0 and steps[1] == EXP and steps[2].name == "l1":
        tau = 1 / x
        if math.isfinite(tau) and math.isfinite(1 / tau):
            yield tau, 3
