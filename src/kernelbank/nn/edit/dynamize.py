"""dynamize: the convolutions of a ConvNet as dynamic convolutions, output equal until they are trained."""

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
"""What is listed as a convolution."""


@dataclass(frozen=True)
class Line:
    """One convolution: its name in the model, what it was, and the spec it became or the reason why it did not."""

    name: str
    was: str
    spec: MixerSpec | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `dynamize` does to every convolution of a model; its text is a table."""

    text: str
    lines: tuple[Line, ...]

    @property
    def turned(self) -> tuple[Line, ...]:
        """The convolutions that become dynamic."""
        return tuple(line for line in self.lines if line.spec is not None)

    @property
    def left(self) -> tuple[Line, ...]:
        """The convolutions that stay as they are, each with the reason."""
        return tuple(line for line in self.lines if line.spec is None)

    def __str__(self) -> str:
        cells = [("convolution", "was", "became")]
        cells += [(line.name, line.was, str(line.spec or f"- {line.reason}")) for line in self.lines]
        said = f"{len(self.turned)} of {len(self.lines)} convolutions turned with {self.text!r}"
        return "\n".join([columns(cells), said])


def dynamize(
    model: nn.Module, text: str, *, only: str | Sequence[str] | None = None, skip: str | Sequence[str] = ()
) -> nn.Module:
    """Turn the convolutions of `model` into the dynamic convolutions of `text`, in place, and return the model (as
    timm.layers.convert_sync_batchnorm does; a model that is one convolution comes back as a new module).

    `text` is a spec, such as ``dconv``, ``condconv`` or ``ddwconv``, without its kernel and size, which are each
    convolution's own; a kernel or size that is typed takes the convolutions that have it. The output is equal until
    training changes it, see `DynamicConv2d.from_conv`. The parameters are new: give them to the optimiser anew.

    `only` and `skip` are names of convolutions or of modules that hold them, or patterns (``layer4``,
    ``*.conv2``). Without `only` every convolution is taken except the first. It sees the raw image, whose mean of
    three colours says little to route by; the public D-Conv ResNet keeps it too (kaijieshi7/
    Dynamic-convolution-Pytorch at 4befa50, dy_resnet.py).

    What was turned and what was not, with the reason, is ``model.dynamized``, a `Report` whose text is a table;
    `survey` gives it beforehand.

    Raises SpecError for a spec that makes no kernel for each image or cannot start as a convolution; InputError
    for a name that matches no convolution, for a convolution named in full in `only` that cannot be turned, and when
    none can be. The model is then unchanged.
    """
    report = survey(model, text, only=only, skip=skip)
    made = {line.name: DynamicConv2d.from_conv(model.get_submodule(line.name), text) for line in report.turned}
    for name, module in made.items():
        if name:
            model.set_submodule(name, module)
    model = made.get("", model)
    object.__setattr__(model, "dynamized", report)
    return model


def survey(
    model: nn.Module, text: str, *, only: str | Sequence[str] | None = None, skip: str | Sequence[str] = ()
) -> Report:
    """What `dynamize` would do, without doing it. Raises as `dynamize` does."""
    read_start(text)
    found = [(name, module) for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, CONVOLUTIONS)]  # fmt: skip
    if not found:
        raise InputError(f"a {type(model).__name__} has no convolutions")
    names = [name for name, _ in found]
    asked = names if only is None else _matching(names, only, "only")
    skipped, twice = _matching(names, skip, "skip"), _used_twice(model)
    lines = []
    for name, module in found:
        first = only is None and name == names[0] and len(names) > 1
        reasons = (
            "skipped by name" if name in skipped else "",
            "not asked for by name" if name not in asked else "",
            "the first convolution sees the raw image; name it in only= to turn it" if first else "",
            f"it shares its weight with {twice[name]}" if name in twice else "",
        )
        lines.append(_line(name, module, text, next(filter(None, reasons), "")))
    report = Report(text, tuple(lines))
    _check_asked(report, only)
    return report


def _line(name: str, module: nn.Module, text: str, reason: str) -> Line:
    was = f"{type(module).__name__}({module.extra_repr()})"
    if reason:
        return Line(name, was, None, reason)
    try:
        return Line(name, was, conv_spec(module, text))
    except SpecError as error:
        return Line(name, was, None, str(error))


def _check_asked(report: Report, only: str | Sequence[str] | None) -> None:
    """Raises InputError when a convolution named in full was not turned, or none was."""
    named = set(_patterns(only or ()))
    for line in report.left:
        if line.name in named:
            raise InputError(f"only={line.name!r}: {report.text!r} cannot turn {line.was}: {line.reason}")
    if not report.turned:
        reasons = "; ".join(f"{line.name or 'it'}: {line.reason}" for line in report.left[:3])
        more = f"; and {len(report.left) - 3} more" if len(report.left) > 3 else ""
        raise InputError(f"{report.text!r} turns none of the {len(report.lines)} convolutions: {reasons}{more}")


def _patterns(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _matching(names: list[str], given: str | Sequence[str], field: str) -> set[str]:
    """The names that a pattern matches, or that lie in a module that it matches. Raises InputError for a pattern
    without any."""
    matched: set[str] = set()
    for pattern in _patterns(given):
        hits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not hits:
            raise InputError(f"{field}={pattern!r} matches no convolution{suggest(pattern, names)}")
        matched |= hits
    return matched


def _used_twice(model: nn.Module) -> dict[str, str]:
    """Modules that hold a parameter which another one holds too, or which are in two places: name -> the others."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    shared = [names for names in holders.values() if len(names) > 1]
    return {name: ", ".join(other for other in names if other != name) for names in shared for name in names}
