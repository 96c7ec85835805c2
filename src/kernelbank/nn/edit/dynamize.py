"""`dynamize`: make the convolutions of a ConvNet dynamic. The output is the same until they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from timm.layers import CondConv2d
from torch import nn
from torch.nn.modules.conv import _ConvNd

from kernelbank.errors import InputError
from kernelbank.nn.conv_spec import conv_spec, read_start
from kernelbank.nn.dynamic_conv import DynamicConv2d
from kernelbank.spec import MixerSpec, SpecError
from kernelbank.text import columns, suggest

CONVOLUTIONS = (_ConvNd, DynamicConv2d, CondConv2d)
"""The modules that a report lists."""


@dataclass(frozen=True)
class ConvOutcome:
    """The outcome for one convolution: its name in the model, its former class and arguments, and its spec, or None and
    the reason."""

    name: str
    was: str
    spec: MixerSpec | None
    reason: str = ""


@dataclass(frozen=True)
class DynamizeReport:
    """The outcome for every convolution of a model under the spec `text`. Its string is a table."""

    text: str
    outcomes: tuple[ConvOutcome, ...]

    @property
    def converted(self) -> tuple[ConvOutcome, ...]:
        """The convolutions that become dynamic."""
        return tuple(outcome for outcome in self.outcomes if outcome.spec is not None)

    @property
    def unchanged(self) -> tuple[ConvOutcome, ...]:
        """The convolutions that stay as they are, each with the reason."""
        return tuple(outcome for outcome in self.outcomes if outcome.spec is None)

    def __str__(self) -> str:
        cells = [("convolution", "was", "became")]
        cells += [(outcome.name, outcome.was, str(outcome.spec or f"- {outcome.reason}")) for outcome in self.outcomes]
        total = f"{len(self.converted)} of {len(self.outcomes)} convolutions became dynamic with {self.text!r}"
        return "\n".join([columns(cells), total])


def dynamize(
    model: nn.Module, text: str, *, only: str | Sequence[str] | None = None, skip: str | Sequence[str] = ()
) -> nn.Module:
    """Replace the convolutions of `model` by dynamic convolutions, in place, and return the model (a new module if the
    model itself is a convolution), as timm.layers.convert_sync_batchnorm does.

    The output stays the same until training changes it (see `DynamicConv2d.from_conv`). The parameters are new objects:
    create the optimiser afterwards. ``model.dynamized`` is a `DynamizeReport`, a table of all convolutions with the
    reason for those that stay. `survey` returns the report without changing the model.

    Args:
        model: A ConvNet.
        text: A spec such as ``dconv``, ``condconv`` or ``ddwconv``. Each convolution keeps its own kernel and size; if
            `text` states a kernel or size, only convolutions that have it are replaced.
        only: Names of convolutions, or of modules that contain them, or patterns (``layer4``, ``*.conv2``). The default
            is every convolution but the first, whose input is the raw image: the mean of three colours says little
            about the image, and the public D-Conv ResNet keeps its first convolution too
            (kaijieshi7/Dynamic-convolution-Pytorch at 4befa50, dy_resnet.py).
        skip: Names or patterns of convolutions that stay.

    Raises:
        SpecError: If the spec does not have one kernel per image, or cannot start out equal to a convolution.
        InputError: If a name matches no convolution, a convolution that `only` names in full cannot be replaced, or
            none can. The model is then unchanged.
    """
    report = survey(model, text, only=only, skip=skip)
    modules = {
        outcome.name: DynamicConv2d.from_conv(model.get_submodule(outcome.name), text) for outcome in report.converted
    }
    for name, module in modules.items():
        if name:
            model.set_submodule(name, module)
    model = modules.get("", model)
    object.__setattr__(model, "dynamized", report)
    return model


def survey(
    model: nn.Module, text: str, *, only: str | Sequence[str] | None = None, skip: str | Sequence[str] = ()
) -> DynamizeReport:
    """Return the report of `dynamize` without changing the model. Raises as `dynamize` does."""
    read_start(text)
    convolutions = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
                    if isinstance(module, CONVOLUTIONS)]  # fmt: skip
    if not convolutions:
        raise InputError(f"invalid model: a {type(model).__name__} without convolutions; expected at least one")
    names = [name for name, _ in convolutions]
    requested = names if only is None else _matching(names, only, "only")
    skipped, shared_with = _matching(names, skip, "skip"), _sharing(model)
    outcomes = []
    for name, module in convolutions:
        first = only is None and name == names[0] and len(names) > 1
        reasons = (
            "named in skip=" if name in skipped else "",
            "not named in only=" if name not in requested else "",
            "the first convolution sees the raw image; name it in only= to replace it" if first else "",
            f"it shares its weight with {shared_with[name]}" if name in shared_with else "",
        )
        outcomes.append(_outcome(name, module, text, next(filter(None, reasons), "")))
    report = DynamizeReport(text, tuple(outcomes))
    _check_requested(report, only)
    return report


def _outcome(name: str, module: nn.Module, text: str, reason: str) -> ConvOutcome:
    was = f"{type(module).__name__}({module.extra_repr()})"
    if reason:
        return ConvOutcome(name, was, None, reason)
    try:
        return ConvOutcome(name, was, conv_spec(module, text))
    except SpecError as error:
        return ConvOutcome(name, was, None, str(error))


def _check_requested(report: DynamizeReport, only: str | Sequence[str] | None) -> None:
    """Raise InputError if a convolution that `only` names in full stays as it is, or all do."""
    named = set(_patterns(only or ()))
    for outcome in report.unchanged:
        if outcome.name in named:
            raise InputError(f"invalid only={outcome.name!r}: {report.text!r} cannot replace {outcome.was}: "
                             f"{outcome.reason}")  # fmt: skip
    if not report.converted:
        reasons = "; ".join(f"{outcome.name or 'it'}: {outcome.reason}" for outcome in report.unchanged[:3])
        more = f"; and {len(report.unchanged) - 3} more" if len(report.unchanged) > 3 else ""
        raise InputError(f"{report.text!r} replaces none of the {len(report.outcomes)} convolutions: {reasons}{more}")


def _patterns(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _matching(names: list[str], patterns: str | Sequence[str], field: str) -> set[str]:
    """Return the names that a pattern matches, or that lie in a module that it matches. Raises InputError for a pattern
    without a match."""
    matched: set[str] = set()
    for pattern in _patterns(patterns):
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not hits:
            raise InputError(f"invalid {field}={pattern!r}, which matches no convolution{suggest(pattern, names)}")
        matched |= hits
    return matched


def _sharing(model: nn.Module) -> dict[str, str]:
    """Return the modules that share a parameter with others or have several names: name -> the others."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    groups = [names for names in holders.values() if len(names) > 1]
    return {name: ", ".join(other for other in names if other != name) for names in groups for name in names}
