"""Which cells can be built together, and which inherited cells are reset so that they can. Imports no torch.

Each field has one function below that yields the reasons why its value does not fit the other cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple

from kernelbank.errors import SpecError
from kernelbank.spec.axes import (
    AXES,
    All,
    Box,
    Depthwise,
    Dynamic,
    Full,
    Grouped,
    Mean,
    NoPosition,
    Own,
    Pool,
    Predict,
    Project,
    Rope,
    Stack,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.pipeline import read_pipeline

Cells = Mapping[str, Any]
"""Values by field."""

RESETTABLE = ("position", "activation", "mix", "support")
"""The fields that may be reset, in the order in which ties are broken."""


class Violation(NamedTuple):
    """A field whose value does not fit the other cells, and why."""

    field: str
    reason: str


def violations(cells: Cells) -> Iterator[Violation]:
    """Yield everything that keeps the cells from being built together."""
    for field, reasons in REASONS.items():
        yield from (Violation(field, reason) for reason in reasons(cells))


def is_valid(cells: Cells) -> bool:
    """Whether the cells can be built together."""
    return not any(violations(cells))


# ---- one function per field ------------------------------------------------------------------------------


def _kernel(cells: Cells) -> Iterator[str]:
    bank, kernel = cells["bank"], cells["kernel"]
    if isinstance(kernel, Full) and not isinstance(bank, Static):
        yield f"full needs bank static, not {bank}, because generating full kernels would take C*C*C weights"
    if isinstance(bank, Box) and kernel != Grouped(1):
        yield "bank box has one weight shared by all channels"
    attention = isinstance(bank, Dynamic) and cells["frame"] == "linear"
    if isinstance(kernel, TwoStep) and not kernel.plain and not attention:
        yield f"a norm or a learned scale needs bank dynamic and frame linear, not {bank} and {cells['frame']}"


def _bank(cells: Cells) -> Iterator[str]:
    bank = cells["bank"]
    if isinstance(cells["kernel"], TwoStep) and isinstance(bank, Static) and bank.single:
        yield "kernel two_step makes one channel per kernel, so K must be > 1"


def _size(cells: Cells) -> Iterator[str]:
    if isinstance(cells["bank"], Box) and cells["size"] < 3:
        yield "bank box is the mean of the taps minus the centre, which is zero at size 1"


def _mix(cells: Cells) -> Iterator[str]:
    bank, mix, kernel = cells["bank"], cells["mix"], cells["kernel"]
    two_step, static = isinstance(kernel, TwoStep), isinstance(bank, Static)
    if two_step and not isinstance(mix, (Stack, Project)):
        yield f"kernel two_step stacks kernels as channels between its steps, and {mix} leaves a single kernel"
    if not two_step and isinstance(mix, (Stack, Project)):
        yield f"kernel {kernel} applies one kernel per position, and {mix} leaves several"
    if not isinstance(bank, Dynamic) and isinstance(mix, (Pool, Project)):
        yield f"{mix} works on kernels generated at positions, so it needs bank dynamic, not {bank}"
    if not static and isinstance(mix, Predict):
        yield f"predict mixes a bank of learned kernels, so it needs bank static, not {bank}"
    if static and not two_step and not isinstance(mix, Mean if bank.single else Predict):
        yield f"with kernel {kernel}, {bank} " + ("is used as it is" if bank.single else "needs predicted coefficients")


def _activation(cells: Cells) -> Iterator[str]:
    kernel, activation = cells["kernel"], cells["activation"]
    if isinstance(kernel, TwoStep) and not activation:
        yield "kernel two_step has an activation between its steps"
    if activation and not isinstance(kernel, TwoStep):
        yield f"an activation stands between the two steps of kernel two_step, and kernel {kernel} has one step"
    if sum(step.name == "batchnorm" for step in activation) > 1:
        yield "at most one batchnorm step can own the parameters activation_norm"


def _support(cells: Cells) -> Iterator[str]:
    bank, support, mix = cells["bank"], cells["support"], cells["mix"]
    if isinstance(support, All):
        return
    if not isinstance(bank, Dynamic):
        yield f"the kernels of bank {bank} belong to no position, so every position sees all of them"
    elif bank.stride > 1:
        yield f"stride={bank.stride} generates kernels on the pooled grid, which only support all reads"
    if isinstance(mix, Project):
        yield f"{mix} mixes the kernels of all positions"
    if isinstance(support, Own) and isinstance(cells["kernel"], TwoStep):
        yield "self needs a one-step kernel, because two steps over one kernel have nothing to select"
    if isinstance(support, Window) and support.pad != "masked" and (cells["size"] > 1 or cells["frame"] == "bn_relu"):
        yield f"pad={support.pad} is the padding of published checkpoints of size 1 without BatchNorm"


def _position(cells: Cells) -> Iterator[str]:
    bank, mix, kernel = cells["bank"], cells["mix"], cells["kernel"]
    if isinstance(cells["position"], NoPosition):
        return
    if isinstance(cells["position"], Rope):
        yield from _rope(cells)
        return
    attention = isinstance(kernel, TwoStep) and isinstance(mix, Stack)
    depthwise = isinstance(kernel, Depthwise) and isinstance(mix, Mean)
    if not isinstance(bank, Dynamic):
        yield f"the kernels of bank {bank} have no position"
    elif not (attention or depthwise):
        yield "relative needs kernel two_step with mix stack, or kernel depthwise with mix mean"
    elif bank.stride > 1:
        yield f"stride={bank.stride} generates kernels on the pooled grid, which has no offsets to positions"


def _rope(cells: Cells) -> Iterator[str]:
    bank, support = cells["bank"], cells["support"]
    if not isinstance(bank, Dynamic):
        yield f"the kernels of bank {bank} have no position"
    elif not (isinstance(cells["kernel"], TwoStep) and isinstance(cells["mix"], Stack)):
        yield "rope needs kernel two_step with mix stack, whose scores it makes depend on the offset"
    elif bank.stride > 1:
        yield f"stride={bank.stride} generates kernels on the pooled grid, which has no rows and columns of positions"
    if cells["size"] > 1:
        yield f"a patch of size {cells['size']} holds operands of several positions"
    if isinstance(support, Window) and support.pad != "masked":
        yield f"pad={support.pad} moves the positions of the grid"


REASONS: dict[str, Callable[[Cells], Iterator[str]]] = {
    "kernel": _kernel,
    "bank": _bank,
    "size": _size,
    "mix": _mix,
    "activation": _activation,
    "support": _support,
    "position": _position,
}
"""Why a field's value does not fit the others. The first violation is the one reported."""


# ---- resets ----------------------------------------------------------------------------------------------


def reset(cells: Cells, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the cells with `names` at their neutral values: ``none``, ``identity,count`` for two_step or no
    activation, ``stack`` for two_step or ``mean``, ``all``."""
    two_step = isinstance(cells["kernel"], TwoStep)
    neutral = {
        "position": NoPosition(),
        "activation": read_pipeline("identity,count") if two_step else (),
        "mix": Stack() if two_step else Mean(),
        "support": All(),
    }
    return {**cells, **{name: neutral[name] for name in names}}


def with_resets(cells: Cells, typed: Cells) -> dict[str, Any]:
    """Return `cells` with the smallest set of inherited cells, those not in `typed`, reset so that they can be built.

    Raises: SpecError: If no set of resets is enough. It names the field that does not fit in the best attempt.
    """
    inherited = [name for name in RESETTABLE if name not in typed]
    candidates = list(_candidates(cells, inherited))
    for candidate in candidates:
        if is_valid(candidate):
            return candidate
    best = min(candidates, key=lambda candidate: len(list(violations(candidate))))
    raise invalid(best, inherited)


def _candidates(cells: Cells, names: list[str]) -> Iterator[dict[str, Any]]:
    """The cells with every subset of `names` reset, smallest subsets first."""
    for size in range(len(names) + 1):
        for subset in combinations(names, size):
            yield reset(cells, subset)


def invalid(cells: Cells, inherited: list[str] | None = None) -> SpecError:
    """The error for cells that violate something: the field, its value, the reason, and the example values that would
    fit (after a reset of `inherited` cells)."""
    name, reason = next(violations(cells))
    others = [field for field in inherited or [] if field != name]
    fitting = [
        AXES[name].show(value)
        for value in AXES[name].examples
        if any(map(is_valid, _candidates({**cells, name: value}, others)))
    ]
    if name == "activation" and fitting and fitting != ["none"]:
        fitting = ["steps such as identity,count or softmax"]
    expected = ", ".join(fitting) or f"a change of another cell, since no {name} fits these"
    return SpecError(f"invalid {name}={AXES[name].show(cells[name])}: {reason}; expected {expected}")
