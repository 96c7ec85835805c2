"""The axes of a token mixer: closed value types, their text, and what each value accepts. Imports no torch.

A value is a word with arguments, ``window(7, alternate)``; arguments are positional or named, spaces inside
parentheses are ignored, and every value prints the shortest text that reads back to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeGuard

from kernelbank.errors import SpecError
from kernelbank.spec.pipeline import Step, read_pipeline, show_pipeline, softmax
from kernelbank.spec.text import finite, number, read_number, split, split_call
from kernelbank.text import suggest

# ---- arguments -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channels:
    """A number tied to the width C: ``times * C / per`` (``C``, ``4C``, ``C/16``)."""

    times: int = 1
    per: int = 1

    def of(self, dim: int) -> int:
        """The number at width `dim`. Raises SpecError when `per` does not divide it."""
        if dim % self.per:
            raise SpecError(f"{self} is not a whole number at {dim} channels")
        return self.times * dim // self.per

    def __str__(self) -> str:
        return ("" if self.times == 1 else str(self.times)) + "C" + ("" if self.per == 1 else f"/{self.per}")


HOST: Literal["host"] = "host"
ALTERNATE: Literal["alternate"] = "alternate"


@dataclass(frozen=True)
class Argument:
    """What one argument of a value accepts: `legal` says it in words, `read` parses text, `accepts` checks."""

    legal: str
    read: Callable[[str], object]
    accepts: Callable[[object], bool]


def _is_whole(value: object, minimum: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _whole(minimum: int) -> Argument:
    return Argument(f"a whole number >= {minimum}", _read_whole, lambda value: _is_whole(value, minimum))


def _read_whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def _one_of(*words: str) -> Argument:
    return Argument(" or ".join(words), str, lambda value: value in words)


def _either(first: Argument, second: Argument) -> Argument:
    def read(text: str) -> object:
        for argument in (first, second):
            try:
                value = argument.read(text)
            except ValueError:
                continue
            if argument.accepts(value):
                return value
        raise ValueError(text)

    return Argument(f"{first.legal}, or {second.legal}", read,
                    lambda value: first.accepts(value) or second.accepts(value))  # fmt: skip


def _read_multiple(text: str) -> Channels:
    if not text.endswith("C"):
        raise ValueError(text)
    return Channels(times=_read_whole(text[:-1]) if text != "C" else 1)


def _read_fraction(text: str) -> Channels:
    head, slash, per = text.partition("/")
    if head != "C" or not slash:
        raise ValueError(text)
    return Channels(per=_read_whole(per))


def _read_switch(text: str) -> bool:
    try:
        return {"True": True, "False": False}[text]
    except KeyError:
        raise ValueError(text) from None


def _read_linear(text: str) -> None:
    if text != "linear":
        raise ValueError(text)


COUNT = _whole(1)
MULTIPLE = Argument(
    "a multiple of the width such as 4C",
    _read_multiple,
    lambda v: isinstance(v, Channels) and v.per == 1 and v.times >= 1,
)
FRACTION = Argument(
    "a fraction of the width such as C/16",
    _read_fraction,
    lambda v: isinstance(v, Channels) and v.times == 1 and v.per >= 2,
)
WIDTH = Argument("C", _read_multiple, lambda v: v == Channels())
KERNELS = _either(COUNT, MULTIPLE)
GROUPS = _either(_either(COUNT, FRACTION), _one_of(HOST))
HEADS = _either(GROUPS, WIDTH)
REDUCTION = _either(Argument("linear", _read_linear, lambda v: v is None), COUNT)
SHIFT = _either(_whole(0), _one_of(ALTERNATE))
SWITCH = Argument("True or False", _read_switch, lambda v: isinstance(v, bool))
NEIGHBORS = Argument(
    "an odd number >= 3 (for M = 1 write self)", _read_whole, lambda v: _is_whole(v, 3) and v % 2 == 1,
)  # fmt: skip
TEMPERATURE = Argument(
    "a finite number > 0", read_number, lambda v: finite(v) and v > 0,
)  # fmt: skip


def _show(value: object) -> str:
    if value is None:
        return "linear"
    return number(value) if isinstance(value, float) else str(value)


# ---- values ----------------------------------------------------------------------------------------------


def argument(accepts: Argument, default: Any = MISSING) -> Any:
    """A dataclass field that carries what it accepts."""
    return field(metadata={"argument": accepts}, default=default)


@dataclass(frozen=True)
class Value:
    """A value of an axis: a word and its arguments. Subclasses are the closed set."""

    word: ClassVar[str]

    def __post_init__(self) -> None:
        for f in fields(self):
            value, accepts = getattr(self, f.name), f.metadata["argument"]
            if not accepts.accepts(value):
                raise SpecError(f"{self.word}: {f.name}={_show(value)} is not legal; legal: {accepts.legal}")
        self._check()

    def _check(self) -> None:
        """What the arguments must fulfil together. Raises SpecError."""

    def __str__(self) -> str:
        shown, positional = [], True
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is not MISSING and value == f.default:
                positional = False
                continue
            shown.append(_show(value) if positional else f"{f.name}={_show(value)}")
        return self.word + (f"({', '.join(shown)})" if shown else "")

    @classmethod
    def signature(cls) -> str:
        """The value as it is written, with its arguments and defaults: ``window(M, shift=0, pad=masked)``."""
        shown = [f.name if f.default is MISSING else f"{f.name}={_show(f.default)}" for f in fields(cls)]
        return cls.word + (f"({', '.join(shown)})" if shown else "")


@dataclass(frozen=True)
class Dynamic(Value):
    """One kernel generated at every position of this image by a static conv. `r`: bottleneck reduction
    (None is linear); `squash` acts on the generated weights; stride s generates on the s x s pooled grid."""

    word: ClassVar[str] = "dynamic"
    r: int | None = argument(REDUCTION, None)
    squash: Literal["identity", "sigmoid", "tanh"] = argument(_one_of("identity", "sigmoid", "tanh"), "identity")
    stride: int = argument(COUNT, 1)


@dataclass(frozen=True)
class Static(Value):
    """K learned kernels, the same for every image; K is a number or a multiple of the width (``4C``)."""

    word: ClassVar[str] = "static"
    K: int | Channels = argument(KERNELS)

    @property
    def single(self) -> bool:
        """Whether the bank holds one kernel."""
        return self.K == 1


@dataclass(frozen=True)
class Box(Value):
    """The mean of the taps inside the grid minus the centre; no parameters (PoolFormer, 2111.11418)."""

    word: ClassVar[str] = "box"


@dataclass(frozen=True)
class All(Value):
    """A position sees every kernel."""

    word: ClassVar[str] = "all"


@dataclass(frozen=True)
class Window(Value):
    """A position sees the kernels of its M x M window; `alternate` shifts by M//2 in odd blocks. `pad` states
    what happens at windows that the grid does not fill: `masked` is the definition, `mmpretrain` and `timm`
    reproduce those libraries' padding (systems.md 5.8) so that published checkpoints keep their numbers."""

    word: ClassVar[str] = "window"
    M: int = argument(_whole(2))
    shift: int | Literal["alternate"] = argument(SHIFT, 0)
    pad: Literal["masked", "mmpretrain", "timm"] = argument(_one_of("masked", "mmpretrain", "timm"), "masked")

    @property
    def resolved_shift(self) -> int:
        """The shift of one block. Raises SpecError while it alternates."""
        if not isinstance(self.shift, int):
            raise SpecError(f"support={self} is not resolved for a block; take spec.at_block(i) first")
        return self.shift

    def _check(self) -> None:
        if isinstance(self.shift, int) and self.shift >= self.M:
            raise SpecError(
                f"window: shift={self.shift} is not legal; legal: 0 to {self.M - 1} (below M), or alternate"
            )


@dataclass(frozen=True)
class Neighborhood(Value):
    """A position sees the M x M kernels around it, M odd, shifted inward at borders (NAT, 2204.07143)."""

    word: ClassVar[str] = "neighborhood"
    M: int = argument(NEIGHBORS)


@dataclass(frozen=True)
class Own(Value):
    """A position sees only its own kernel."""

    word: ClassVar[str] = "self"


@dataclass(frozen=True)
class Stack(Value):
    """Each kernel is one output channel."""

    word: ClassVar[str] = "stack"


@dataclass(frozen=True)
class Mean(Value):
    """Generate, then average the kernels."""

    word: ClassVar[str] = "mean"


@dataclass(frozen=True)
class Pool(Value):
    """Average the features, then generate one kernel."""

    word: ClassVar[str] = "pool"


@dataclass(frozen=True)
class Project(Value):
    """A learned (generated kernels) x r matrix mixes them into r, which are stacked (Linformer, 2006.04768)."""

    word: ClassVar[str] = "project"
    r: int = argument(COUNT)
    shared: bool = argument(SWITCH, False)


@dataclass(frozen=True)
class Predict(Value):
    """Coefficients predicted from the pooled image, through `gate`(./tau), mix K kernels into one."""

    word: ClassVar[str] = "predict"
    gate: Literal["softmax", "sigmoid"] = argument(_one_of("softmax", "sigmoid"))
    tau: float = argument(TEMPERATURE, 1.0)
    r: int | None = argument(REDUCTION, None)

    def _check(self) -> None:
        object.__setattr__(self, "tau", float(self.tau))


@dataclass(frozen=True)
class TwoStep(Value):
    """C_in -> 1 per kernel, activation, 1 -> C_out per kernel, in `heads` groups (paper 4.2)."""

    word: ClassVar[str] = "two_step"
    heads: int | Channels | Literal["host"] = argument(HEADS, HOST)


def _not_depthwise(value: Value) -> None:
    """`grouped(C)` and `full(C)` would be second names of `depthwise`."""
    for f in fields(value):
        if getattr(value, f.name) == Channels():
            raise SpecError(f"{value.word}: {f.name}=C is not legal; one group per channel is written depthwise")


@dataclass(frozen=True)
class Full(Value):
    """C_in -> C_out, in `groups` groups."""

    word: ClassVar[str] = "full"
    groups: int | Channels | Literal["host"] = argument(HEADS, 1)

    def _check(self) -> None:
        _not_depthwise(self)


@dataclass(frozen=True)
class Depthwise(Value):
    """One weight per channel and tap."""

    word: ClassVar[str] = "depthwise"


@dataclass(frozen=True)
class Grouped(Value):
    """Depth-wise with one weight per group and tap: G groups share their weights (involution, 2103.06255)."""

    word: ClassVar[str] = "grouped"
    G: int | Channels | Literal["host"] = argument(HEADS)

    def _check(self) -> None:
        _not_depthwise(self)


# ---- axes ------------------------------------------------------------------------------------------------


def _read_arguments(axis: str, text: str, kind: type[Value], inside: str) -> dict[str, object]:
    """The arguments of a value, positional first, then named. Raises SpecError."""
    declared, given = list(fields(kind)), dict[str, object]()
    parts = [part.partition("=") for part in (split(inside, ",") if inside else [])]
    for position, (name, named, value) in enumerate(parts):
        if not named:
            part = name
            if position >= len(declared) or any(equals for _, equals, _ in parts[:position]):
                raise SpecError(f"{axis}: {text} is not legal; it is written {kind.signature()}")
            name, value = declared[position].name, part
        chosen = next((f for f in declared if f.name == name), None)
        if chosen is None or name in given or not value:
            what = f"no argument {name!r}" if chosen is None else f"{name} twice" if name in given else f"empty {name}"
            raise SpecError(f"{axis}: {text} is not legal ({what}); it is written {kind.signature()}")
        accepts: Argument = chosen.metadata["argument"]
        try:
            given[name] = accepts.read(value)
        except ValueError:
            raise SpecError(f"{axis}: {text} is not legal; {name}={value}, legal: {accepts.legal}") from None
    missing = [f.name for f in declared if f.default is MISSING and f.name not in given]
    if missing:
        raise SpecError(f"{axis}: {text} is not legal; {missing[0]} is missing, it is written {kind.signature()}")
    return given


@dataclass(frozen=True)
class Axis:
    """One field of the record: how its text reads and prints, what is legal, and example values that stand
    for every word of the axis (used to list what is legal in an error, and by the tests)."""

    name: str
    legal: str
    read: Callable[[str], Any]
    accepts: Callable[[object], bool]
    examples: tuple[Any, ...]
    show: Callable[[Any], str] = _show


def _choice(name: str, *examples: Value) -> Axis:
    kinds = {type(example).word: type(example) for example in examples}
    legal = ", ".join(kind.signature() for kind in kinds.values())

    def read(text: str) -> Value:
        word, inside = split_call(name, text)
        if word not in kinds:
            raise SpecError(f"{name}: unknown value {word!r}{suggest(word, kinds)}; legal: {legal}")
        kind = kinds[word]
        if inside == "":
            raise SpecError(f"{name}: {text} is not legal; empty parentheses, it is written {kind.signature()}")
        try:
            return kind(**_read_arguments(name, text, kind, inside or ""))
        except SpecError as error:
            raise SpecError(str(error) if str(error).startswith(f"{name}:") else f"{name}: {error}") from None

    return Axis(name, legal, read, lambda v: type(v) in kinds.values(), examples)


def _closed(name: str, *options: str) -> Axis:
    def read(text: str) -> str:
        if text not in options:
            raise SpecError(f"{name}: unknown value {text!r}{suggest(text, options)}; legal: {', '.join(options)}")
        return text

    return Axis(name, ", ".join(options), read, lambda v: v in options, options)


def _odd(value: object) -> bool:
    return _is_whole(value, 1) and value % 2 == 1


def _read_size(text: str) -> int:
    try:
        value = _read_whole(text)
    except ValueError:
        value = 0
    if not _odd(value):
        raise SpecError(f"size: {text} is not legal; legal: 1, 3, 5, 7, ...")
    return value


def _read_bias(text: str) -> bool:
    try:
        return _read_switch(text)
    except ValueError:
        raise SpecError(f"bias: {text} is not legal; legal: True, False") from None


def _is_pipeline(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(step, Step) for step in value)


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        _choice("bank", Dynamic(), Dynamic(4), Dynamic(stride=2), Static(1), Static(4), Box()),
        _choice("support", All(), Window(7), Neighborhood(7), Own()),
        _choice("mix", Stack(), Mean(), Pool(), Project(64), Predict("softmax")),
        _choice("kernel", TwoStep(), Full(), Depthwise(), Grouped(1), Grouped(2)),
        Axis("size", "1, 3, 5, 7, ...", _read_size, _odd, (1, 3)),
        Axis("activation", "steps separated by commas, or none", read_pipeline, _is_pipeline,
             (softmax(), ()), show_pipeline),
        _closed("position", "none", "relative"),
        _closed("frame", "linear", "bn_relu", "bare"),
        Axis("bias", "True, False", _read_bias, lambda v: isinstance(v, bool), (True, False)),
    )
}  # fmt: skip
