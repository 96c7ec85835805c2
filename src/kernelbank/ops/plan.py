"""`mix`: the operator, and `plan`: the one pure function that says which paths run it and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from kernelbank.ops import associated, bottleneck, conv, images, kernel, pointwise, reference, regions, sdpa, shifts
from kernelbank.ops.context import Params, Setting, check_input, check_mask
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import Geometry, crop, geometry, lay_out
from kernelbank.ops.linear import FORMS
from kernelbank.ops.machine import Machine, machine
from kernelbank.ops.path import Call, Path, PathError, Slot
from kernelbank.ops.serving import Forms, Mixers, Positions
from kernelbank.ops.toeplitz import dense, fourier, hybrid, hybrid_fft
from kernelbank.spec import MixerSpec, TwoStep
from kernelbank.spec.inventory import Grid
from kernelbank.text import suggest

Core = Callable[[Tensor, Tensor, Params, Setting], Tensor]
Run = Callable[[Tensor, Params, Setting], Tensor]
FormFit = Callable[[None, Call, Machine], str | None]


@dataclass(frozen=True)
class Choice:
    """A path and the reason it was chosen."""

    path: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The path of each slot. A mixer that makes no use of the positional operator has none."""

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
    """What is said of one path: chosen, able or refused, and why."""

    slot: Slot
    path: str
    verdict: str
    reason: str


def _framed(core: Core) -> Run:
    """The static convs around a core, on the padded layout where the record states one."""

    def run(x_BTC: Tensor, p: Params, s: Setting) -> Tensor:
        operand, source = enter(lay_out(x_BTC, s.geo), p, s)
        return crop(leave(core(operand, source, p, s), p, s), s.geo)

    return run


def _attending(attend: kernel.Attend) -> Run:
    return _framed(lambda operand, source, p, s: kernel.two_step(operand, source, p, s, attend))


def _by(module: ModuleType) -> Core:
    """The two cores of a module, whichever the record's kernel needs."""

    def core(operand: Tensor, source: Tensor, p: Params, s: Setting) -> Tensor:
        steps: Core = module.two_step if isinstance(s.spec.kernel, TwoStep) else module.one_step
        return steps(operand, source, p, s)

    return core


# In each slot the first path that fits is taken; the last ones serve whatever the others refuse.
PATHS: dict[str, Path] = {
    "bottleneck": Path("mixer", _framed(bottleneck.two_step), Mixers.bottleneck, Mixers.fits_bottleneck),
    "windows_sdpa": Path("mixer", regions.mixer(regions.softmax), Mixers.windows_sdpa, Mixers.fits_windows_sdpa),
    "windows": Path("mixer", regions.mixer(regions.products), Mixers.windows, Mixers.fits_windows),
    "associated": Path("mixer", _attending(associated.attend_affine), Mixers.associated, Mixers.fits_associated,
                       Mixers.located),
    "moments": Path("mixer", _attending(associated.attend_moments), Mixers.moments, Mixers.fits_moments,
                    Mixers.located),
    "sdpa": Path("mixer", _attending(sdpa.attend), Mixers.sdpa, Mixers.fits_sdpa),
    "pointwise_onednn": Path("mixer", _attending(pointwise.attend_onednn), Mixers.pointwise_onednn,
                             Mixers.fits_pointwise_onednn),
    "pointwise": Path("mixer", _attending(pointwise.attend), Mixers.pointwise, Mixers.fits_pointwise),
    "shifts": Path("mixer", _framed(shifts.one_step), Mixers.shifts, Mixers.fits_shifts, Mixers.one_step_everywhere),
    "images": Path("mixer", _framed(images.one_step), Mixers.images, Mixers.fits_images),
    "vectorised": Path("mixer", _framed(_by(kernel)), Mixers.vectorised, Mixers.fits_vectorised,
                       Mixers.one_step_everywhere),
    "conv": Path("mixer", _framed(_by(conv)), Mixers.conv, Mixers.never, Mixers.one_step_everywhere),
    "reference": Path("mixer", reference.mixer, Mixers.reference, Mixers.never),
    "mkldnn": Path("linear", FORMS["mkldnn"], Forms.mkldnn, Forms.fits_mkldnn),
    "conv1x1": Path("linear", FORMS["conv1x1"], Forms.any, Forms.fits_conv1x1),
    "linear": Path("linear", FORMS["linear"], Forms.any, Forms.fits_linear),
    "dense": Path("position", dense, Positions.any, Positions.fits_dense),
    "hybrid": Path("position", hybrid, Positions.any, Positions.fits_hybrid),
    "hybrid_fft": Path("position", hybrid_fft, Positions.any, Positions.fits_hybrid_fft),
    "fourier": Path("position", fourier, Positions.any, Positions.fits_fourier),
}  # fmt: skip
SLOTS: tuple[Slot, ...] = ("mixer", "linear", "position")

# The forced paths, innermost last. A list and no ContextVar: torch.compile cannot trace the latter on torch 2.11.
_forced: list[str] = []


@contextmanager
def use_path(*names: str) -> Iterator[None]:
    """Force a path in this process, or one for each slot: ``with kernelbank.use_path("sdpa", "conv1x1"):``.

    Raises PathError here for an unknown name or two of one slot, and inside for a record or input that a path cannot
    serve.
    """
    for name in names:
        if name not in PATHS:
            raise PathError(f"unknown path {name!r}{suggest(name, PATHS)}; legal: {', '.join(PATHS)}")
    if len({PATHS[name].slot for name in names}) < len(names):
        raise PathError(f"paths {', '.join(names)}: two of them run the same part; legal: one a part")
    _forced.extend(names)
    try:
        yield
    finally:
        del _forced[len(_forced) - len(names) :]


def plan(s: Setting, call: Call, machine: Machine, forced: Mapping[Slot, str] | None = None) -> Plan:
    """The paths for the setting `s` and what `call` says of the input, on a `machine` as probed, and the reasons.
    Pure: the same question has the same answer. `forced` fixes the path of a slot.

    Raises PathError when a forced path cannot serve: it says why, and which can.
    """
    forced = forced or {}
    linear = linear_form(call, machine, forced)
    position = _choose("position", s, call, machine, forced)
    mixer = _choose("mixer", s, call, machine, forced)
    if mixer is None:  # only where a positional operator is forced that no mixer path would run
        able = {name: path for name, path in PATHS.items() if path.slot == "mixer" and path.spreads(s)}
        why = "; ".join(f"{name}: {path.refuses(s, call, machine)}" for name, path in able.items())
        raise PathError(
            f"path {forced['position']!r} cannot serve {s.spec}: every mixer path with a positional operator "
            f"refuses ({why}); paths that can: none"
        )
    return Plan(mixer, linear, position if PATHS[mixer.path].spreads(s) else None)


def linear_form(call: Call, machine: Machine, forced: Mapping[Slot, str]) -> Choice:
    """The form of a static conv, whatever the record. Raises PathError when a forced form cannot serve."""
    forms = {name: path for name, path in PATHS.items() if path.slot == "linear"}
    refused = {name: cast(FormFit, path.refuses)(None, call, machine) for name, path in forms.items()}
    able = [name for name, reason in refused.items() if reason is None]
    if name := forced.get("linear"):
        if name not in able:
            raise PathError(f"path {name!r} cannot serve {call}: {refused[name]}; paths that can: {', '.join(able)}")
        return Choice(name, "forced")
    reasons = {name: cast(FormFit, forms[name].fits)(None, call, machine) for name in able}
    return next(Choice(name, reason) for name, reason in reasons.items() if reason is not None)


def _choose(slot: Slot, s: Setting, call: Call, machine: Machine, forced: Mapping[Slot, str]) -> Choice | None:
    """The first path of a slot that serves and fits, or the forced one."""
    if slot in forced:
        _check_forced(slot, s, call, machine, forced)
        return Choice(forced[slot], "forced")
    for name, path in PATHS.items():
        if path.slot != slot or (slot == "mixer" and "position" in forced and not path.spreads(s)):
            continue
        if path.refuses(s, call, machine) is None and (reason := path.fits(s, call, machine)) is not None:
            return Choice(name, reason)
    if slot == "mixer":  # a forced positional operator, where no path that uses it would be taken by itself
        able = (n for n, p in PATHS.items() if p.slot == slot and p.spreads(s) and p.refuses(s, call, machine) is None)
        return next((Choice(name, "it has the forced positional operator") for name in able), None)
    return None


def _check_forced(slot: Slot, s: Setting, call: Call, machine: Machine, forced: Mapping[Slot, str]) -> None:
    """Raises PathError when the forced path of a slot cannot serve."""
    name = forced[slot]
    reason = PATHS[name].refuses(s, call, machine)
    if reason is None and slot == "mixer" and "position" in forced and not PATHS[name].spreads(s):
        reason = f"it has no positional operator to run as {forced['position']!r}"
    if reason is not None:
        able = [n for n, p in PATHS.items() if p.slot == slot and p.refuses(s, call, machine) is None]
        raise PathError(f"path {name!r} cannot serve {s.spec}: {reason}; paths that can: {', '.join(able) or 'none'}")


def verdicts(s: Setting, call: Call, machine: Machine) -> list[Verdict]:
    """What every path says of a setting: the chosen ones with the plan's reason, the refusing ones with theirs."""
    chosen = plan(s, call, machine)
    reasons = {c.path: c.reason for c in (chosen.mixer, chosen.linear, chosen.position) if c is not None}
    said = []
    for name, path in PATHS.items():
        refusal = path.refuses(s, call, machine)
        if name in reasons:
            said.append(Verdict(path.slot, name, "chosen", reasons[name]))
        elif refusal:
            said.append(Verdict(path.slot, name, "refused", refusal))
        else:
            unused = path.slot == "position" and chosen.position is None
            why = path.fits(s, call, machine)
            reason = f"the mixer path {chosen.path} does not use it" if unused else why or "it is not the fastest here"
            said.append(Verdict(path.slot, name, "able", reason))
    return said


_PLANS: dict[object, Plan] = {}


def _planned(s: Setting, call: Call) -> Plan:
    """`plan` on this machine with what is forced now, remembered unless a compiler traces it."""
    here = machine(call.device)
    forced = {PATHS[name].slot: name for name in _forced}
    if call.compiling:
        return plan(s, call, here, forced)
    key = (s.spec, s.dim, s.num_heads, s.geo, s.training, s.attn_drop, s.mask is None, call, here, *_forced)
    if key not in _PLANS:
        if len(_PLANS) > 4096:
            _PLANS.clear()
        _PLANS[key] = plan(s, call, here, forced)
    return _PLANS[key]


def _call(x: Tensor, learns: bool) -> Call:
    return Call(
        x.numel() // max(x.shape[-1], 1),
        x.device.type,
        x.dtype,
        learns and torch.is_grad_enabled(),
        not x.is_meta and torch.is_autocast_enabled(x.device.type),
        torch.compiler.is_compiling(),
    )


def static_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x (..., C) W^T + b, through the exact GELU where it is asked, by the form that a plan takes for a static conv.

    Raises PathError when a forced form cannot serve.
    """
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    call = _call(x, learns)
    form = linear_form(call, machine(call.device), {PATHS[name].slot: name for name in _forced})
    return PATHS[form.path].run(x, weight, bias, gelu)


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
) -> Tensor:
    """The operator: the mixer `spec` with `params` (named as `inventory` lists them) on x (B, T, C) -> (B, T, C).

    T = prefix + H * W with `grid` = (H, W). `attn_mask`, boolean, True where a query may see a kernel: (T, T),
    (B, T, T) or (B, 1, T, T). `geo` is the geometry if it is at hand. In training, BatchNorm buffers among the
    params are updated in place.

    Raises SpecError for a shape that does not fit, an unresolved alternate shift or a mask that the record cannot
    honour, and PathError when a forced path cannot serve.
    """
    check_input(x, spec, grid, prefix)
    s = Setting(
        spec,
        x.shape[-1],
        num_heads,
        geometry(spec, grid, prefix, x.device) if geo is None else geo,
        training,
        temperature,
        attn_drop,
        None if attn_mask is None else check_mask(attn_mask, x, spec),
    )
    call = _call(x, x.requires_grad or any(p.requires_grad for p in params.values()))
    chosen = _planned(s, call)
    position = PATHS[chosen.position.path].run if chosen.position else s.position
    s = replace(s, linear=PATHS[chosen.linear.path].run, position=position)
    return PATHS[chosen.path].run(x, params, s)
