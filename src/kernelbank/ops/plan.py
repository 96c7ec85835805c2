"""`mix`: the operator, and `plan`: the pure function that says which paths run it and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from kernelbank.ops.context import Call, Context, Params, check_input, check_mask
from kernelbank.ops.geometry import Geometry, geometry
from kernelbank.ops.machine import Machine, machine
from kernelbank.ops.paths import LINEAR_PATHS, MIXER_PATHS, POSITION_PATHS, SLOTS, PathError
from kernelbank.ops.paths.path import MixerPath, PositionPath, Slot
from kernelbank.ops.scope import ForkSafeLock, Scope
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid
from kernelbank.text import suggest

Forced = Mapping[Slot, str]
"""The forced path of a slot."""


@dataclass(frozen=True)
class Choice:
    """A path and the reason it was chosen."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The path of each slot; `position` is None for a mixer that does not use the positional operator."""

    mixer: Choice
    linear: Choice
    position: Choice | None = None

    @property
    def path(self) -> str:
        """The mixer's path."""
        return self.mixer.path

    @property
    def reason(self) -> str:
        """Why the mixer's path was chosen."""
        return self.mixer.reason

    def __str__(self) -> str:
        parts = {"mixer": self.mixer, "linear": self.linear, "position": self.position}
        return "; ".join(f"{slot} {c.path}: {c.reason}" for slot, c in parts.items() if c is not None)


@dataclass(frozen=True)
class Verdict:
    """The verdict of a plan on one path: chosen, supported or unsupported, with the reason."""

    slot: Slot
    path: str
    verdict: str
    reason: str


# ---- forced paths ----------------------------------------------------------------------------------------

_forced: Scope[tuple[str, ...]] = Scope("kernelbank_forced_paths", ())


def _forced_paths() -> dict[Slot, str]:
    """The paths that are forced in this thread and task; of two for one slot the inner one."""
    return {SLOTS[name]: name for name in _forced.get()}


@contextmanager
def use_path(*names: str) -> Iterator[None]:
    """Force a path, or one per slot, in this thread and task: ``with kernelbank.use_path("sdpa", "conv1x1"):``.

    Raises:
        PathError: For an unknown name or two paths of one slot; inside, for a spec or an input that a forced path does
            not support.
    """
    for name in names:
        if name not in SLOTS:
            raise PathError(f"unknown path {name!r}{suggest(name, SLOTS)}; expected one of {', '.join(SLOTS)}")
    if len({SLOTS[name] for name in names}) < len(names):
        raise PathError(f"invalid paths {', '.join(names)}: two of them run the same part; expected one per part")
    with _forced.entered((*_forced.get(), *names)):
        yield


# ---- the plan --------------------------------------------------------------------------------------------


def plan(s: Context, call: Call, machine: Machine, forced: Forced | None = None) -> Plan:
    """Return the paths for the context `s` and a `call` on a probed `machine`, with the reasons. Equal arguments give
    equal plans. `forced` fixes the path of a slot.

    Raises:
        PathError: If a forced path does not support the call. The message says why and names the paths that do.
    """
    forced = forced or {}
    linear = linear_form(call, machine, forced)
    position = _position(s, call, machine, forced)
    mixer = _mixer(s, call, machine, forced)
    return Plan(mixer, linear, position if MIXER_PATHS[mixer.path].uses_position(s) else None)


def linear_form(call: Call, machine: Machine, forced: Forced) -> Choice:
    """Return the path of a linear layer. Raises PathError if the forced one does not support the call."""
    reasons = {name: path.unsupported(call, machine) for name, path in LINEAR_PATHS.items()}
    if name := forced.get("linear"):
        if reasons[name] is not None:
            raise PathError(f"path {name!r} does not support the call: {reasons[name]}; {_supported(reasons)}")
        return Choice(name, "forced")
    supported = (path for name, path in LINEAR_PATHS.items() if reasons[name] is None)
    return next(Choice(path.name, why) for path in supported if (why := path.preferred(call, machine)) is not None)


def _mixer(s: Context, call: Call, machine: Machine, forced: Forced) -> Choice:
    """The forced path, or the first that supports the call, is preferred for it, and uses a forced position path."""
    if name := forced.get("mixer"):
        _check_forced(MIXER_PATHS, name, s, call, machine)
        if "position" in forced and not MIXER_PATHS[name].uses_position(s):
            raise PathError(f"path {name!r} has no positional operator to run as {forced['position']!r} for {s.spec}")
        return Choice(name, "forced")
    candidates = [path for path in MIXER_PATHS.values() if "position" not in forced or path.uses_position(s)]
    supported = [path for path in candidates if path.unsupported(s, call, machine) is None]
    for path in supported:
        if (reason := path.preferred(s, call, machine)) is not None:
            return Choice(path.name, reason)
    if supported:  # a forced positional operator, where no path that uses it is preferred
        return Choice(supported[0].name, "it has the forced positional operator")
    why = "; ".join(f"{path.name}: {path.unsupported(s, call, machine)}" for path in candidates)
    raise PathError(
        f"path {forced['position']!r} does not support {s.spec}: no mixer path with a positional operator supports it "
        f"({why}); paths that do: none"
    )


def _position(s: Context, call: Call, machine: Machine, forced: Forced) -> Choice | None:
    """The forced path, or the first that supports the call and is preferred for it; None if there is none."""
    if name := forced.get("position"):
        _check_forced(POSITION_PATHS, name, s, call, machine)
        return Choice(name, "forced")
    for name, path in POSITION_PATHS.items():
        if path.unsupported(s, call, machine) is None and (reason := path.preferred(s, call, machine)) is not None:
            return Choice(name, reason)
    return None


def _check_forced(
    paths: Mapping[str, MixerPath] | Mapping[str, PositionPath], name: str, s: Context, call: Call, machine: Machine
) -> None:
    """Raise PathError if the path `name` does not support the call."""
    reasons = {other: path.unsupported(s, call, machine) for other, path in paths.items()}
    if reasons[name] is not None:
        raise PathError(f"path {name!r} does not support {s.spec}: {reasons[name]}; {_supported(reasons)}")


def _supported(reasons: Mapping[str, str | None]) -> str:
    names = ", ".join(name for name, reason in reasons.items() if reason is None)
    return f"paths that do: {names or 'none'}"


def verdicts(s: Context, call: Call, machine: Machine) -> list[Verdict]:
    """Return the verdict on every path: why it was chosen, does not support the call, or was not chosen."""
    chosen = plan(s, call, machine)
    results = []
    for slot, choice, paths in (
        ("mixer", chosen.mixer, _questions(MIXER_PATHS, s, call, machine)),
        ("linear", chosen.linear, {name: (path.unsupported(call, machine), path.preferred(call, machine))
                                   for name, path in LINEAR_PATHS.items()}),
        ("position", chosen.position, _questions(POSITION_PATHS, s, call, machine)),
    ):  # fmt: skip
        for name, (unsupported, preferred) in paths.items():
            if choice is not None and choice.path == name:
                results.append(Verdict(SLOTS[name], name, "chosen", choice.reason))
            elif unsupported is not None:
                results.append(Verdict(SLOTS[name], name, "unsupported", unsupported))
            else:
                unused = slot == "position" and choice is None
                why = f"the mixer path {chosen.path} does not use it" if unused else preferred
                results.append(Verdict(SLOTS[name], name, "supported", why or "it is not the fastest"))
    return results


def _questions(
    paths: Mapping[str, MixerPath] | Mapping[str, PositionPath], s: Context, call: Call, machine: Machine
) -> dict[str, tuple[str | None, str | None]]:
    """Why each path does not support a call, and why it is preferred."""
    return {
        name: (path.unsupported(s, call, machine), path.preferred(s, call, machine)) for name, path in paths.items()
    }


_PLANS: dict[object, Plan] = {}
_MOST_PLANS = 4096
_LOCK = ForkSafeLock()


def _planned(s: Context, call: Call) -> Plan:
    """`plan` on this machine with the forced paths, remembered unless a compiler traces it."""
    profile, forced = machine(call.device, call.dtype), _forced_paths()
    if call.compiling:
        return plan(s, call, profile, forced)
    key = (s.spec, s.dim, s.num_heads, s.geo, s.training, s.attn_drop, s.mask is None, frozenset(s.modules), call,
           profile, *forced.values())  # fmt: skip
    with _LOCK:
        if (known := _PLANS.get(key)) is not None:
            return known
    planned = plan(s, call, profile, forced)
    with _LOCK:
        if len(_PLANS) >= _MOST_PLANS:
            _PLANS.clear()
        _PLANS[key] = planned
    return planned


# ---- the operator ----------------------------------------------------------------------------------------


def planned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return x (..., C) W^T + b, through the exact GELU if asked, on the path that the plan chooses for linear layers.

    Raises:
        PathError: If a forced path does not support the call.
    """
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    call = Call.of(x, learns)
    choice = linear_form(call, machine(call.device, call.dtype), _forced_paths())
    return LINEAR_PATHS[choice.path].run(x, weight, bias, gelu)


def mix(
    x: Tensor,
    params: Params,
    spec: MixerSpec,
    num_heads: int,
    grid: Grid,
    *,
    prefix: int = 0,
    attn_mask: Tensor | None = None,
    training: bool = False,
    attn_drop: float = 0.0,
    temperature: float | None = None,
    geo: Geometry | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> Tensor:
    """The operator: the mixer `spec` on x (B, T, C) -> (B, T, C), T = prefix + H * W with `grid` = (H, W).

    Args:
        params: The tensors by the names that `inventory` lists. BatchNorm buffers among them are updated in place in
            training.
        attn_mask: The kernels that each query sees, as booleans or as floats 0 and -inf, of shape (T, T), (B, T) for
            key padding, (B, T, T), (B, 1, 1, T) or (B, 1, T, T).
        attn_drop: The rate at which entries of the attention map are dropped in training.
        temperature: Replaces tau of a predict spec in training.
        geo: The geometry, if it is already computed.
        modules: Linear layers, by name, that are called in place of their params.

    Raises:
        SpecError: For a shape that does not fit, an unresolved alternating shift, or an unsupported mask.
        PathError: If a forced path does not support the call.
    """
    check_input(x, spec, grid, prefix)
    s = Context(
        spec,
        x.shape[-1],
        num_heads,
        geometry(spec, grid, prefix, x.device) if geo is None else geo,
        training,
        temperature,
        attn_drop,
        None if attn_mask is None else check_mask(attn_mask, x, spec),
        modules or {},
    )
    # a module may have trainable tensors besides these parameters
    learns = bool(modules) or x.requires_grad or any(p.requires_grad for p in params.values())
    chosen = _planned(s, Call.of(x, learns))
    position: Callable[[Tensor, Tensor, Grid], Tensor] | None = None
    if chosen.position is not None:
        position = POSITION_PATHS[chosen.position.path].run
    s = replace(s, linear=LINEAR_PATHS[chosen.linear.path].run, position=position)
    return MIXER_PATHS[chosen.path].run(x, params, s)
