"""The axes of a token mixer: closed value types, their text, and what each value accepts. Imports no torch.

A value is a word with arguments, ``window(7, alternate)``; arguments are positional or named, spaces inside
parentheses are ignored, and every value prints the shortest text that reads back to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

from kernelbank.errors import SpecError
from kernelbank.spec.arguments import (
    CHANNEL_GROUPS,
    COUNT,
    HEADS,
    HOST,
    KERNELS,
    NEIGHBORS,
    POSITIVE,
    REDUCTION,
    SHIFT,
    SWITCH,
    Argument,
    Channels,
    either,
    is_whole,
    one_of,
    read_switch,
    read_whole,
    show_argument,
    whole,
)
from kernelbank.spec.pipeline import Step, read_pipeline, show_pipeline, softmax
from kernelbank.spec.text import split, split_call
from kernelbank.text import suggest

# ---- values ----------------------------------------------------------------------------------------------


Fault = tuple[str, str]
"""An invalid argument as text, ``shift=7``, and what is expected in its place."""


def argument(kind: Argument, default: Any = MISSING) -> Any:
    """A dataclass field for an argument of this kind."""
    return field(metadata={"argument": kind}, default=default)


@dataclass(frozen=True)
class Value:
    """A value of an axis: a word and its arguments. The subclasses are all the values there are.

    Raises: SpecError: If an argument is invalid.
    """

    word: ClassVar[str]

    def __post_init__(self) -> None:
        declared = fields(self)  # of the instance: torch.compile, which traces All(), has no fields of a class
        for name, expected in self.faults(declared, {f.name: getattr(self, f.name) for f in declared}):
            raise SpecError(f"invalid {name} of {self.word}; expected {expected}")

    @classmethod
    def faults(cls, declared: Iterable[Field[Any]], arguments: Mapping[str, Any]) -> list[Fault]:
        """Return the invalid ones among all arguments by name; a subclass adds what they must fulfil together."""
        return [
            (f"{f.name}={show_argument(arguments[f.name])}", f.metadata["argument"].expected)
            for f in declared
            if not f.metadata["argument"].accepts(arguments[f.name])
        ]

    def __str__(self) -> str:
        texts, positional = [], True
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is not MISSING and value == f.default:
                positional = False
                continue
            texts.append(show_argument(value) if positional else f"{f.name}={show_argument(value)}")
        return self.word + (f"({', '.join(texts)})" if texts else "")

    @classmethod
    def signature(cls) -> str:
        """The value as it is written, with its arguments and defaults: ``window(M, shift=0, pad=masked)``."""
        texts = [f.name if f.default is MISSING else f"{f.name}={show_argument(f.default)}" for f in fields(cls)]
        return cls.word + (f"({', '.join(texts)})" if texts else "")


@dataclass(frozen=True)
class Dynamic(Value):
    """One kernel per position, generated from the image by a static conv.

    Args:
        r: Reduction of the bottleneck; None generates with one linear layer.
        squash: Function applied to the generated weights.
        stride: With stride s, kernels are generated on the grid pooled over s x s cells.
    """

    word: ClassVar[str] = "dynamic"
    r: int | None = argument(REDUCTION, None)
    squash: Literal["identity", "sigmoid", "tanh"] = argument(one_of("identity", "sigmoid", "tanh"), "identity")
    stride: int = argument(COUNT, 1)


@dataclass(frozen=True)
class Static(Value):
    """K learned kernels, shared by all images; K is a number or a multiple of the width (``4C``)."""

    word: ClassVar[str] = "static"
    K: int | Channels = argument(KERNELS)

    @property
    def single(self) -> bool:
        """Whether the bank holds one kernel."""
        return self.K == 1


@dataclass(frozen=True)
class Box(Value):
    """The mean of the taps inside the grid minus the centre, without parameters (PoolFormer, arXiv 2111.11418)."""

    word: ClassVar[str] = "box"


@dataclass(frozen=True)
class All(Value):
    """A position sees every kernel."""

    word: ClassVar[str] = "all"


@dataclass(frozen=True)
class Window(Value):
    """A position sees the kernels of its M x M window (Swin, arXiv 2103.14030).

    Args:
        M: Side of the window.
        shift: Shift of the windows in positions; ``alternate`` is 0 in even blocks and M//2 in odd ones.
        pad: What happens to windows that the grid does not fill. ``masked`` cuts them to the grid, which is the
            definition. ``mmpretrain`` and ``timm`` pad as those libraries do, where padded positions take part in
            the softmax, so that published checkpoints keep their outputs.
    """

    word: ClassVar[str] = "window"
    M: int = argument(whole(2))
    shift: int | Literal["alternate"] = argument(SHIFT, 0)
    pad: Literal["masked", "mmpretrain", "timm"] = argument(one_of("masked", "mmpretrain", "timm"), "masked")

    @property
    def resolved_shift(self) -> int:
        """The shift of one block. Raises: SpecError: If it alternates between blocks."""
        if not isinstance(self.shift, int):
            raise SpecError(f"invalid support={self}: the shift depends on the block; expected spec.at_block(i)")
        return self.shift

    @classmethod
    def faults(cls, declared: Iterable[Field[Any]], arguments: Mapping[str, Any]) -> list[Fault]:
        M, shift = arguments["M"], arguments["shift"]
        too_far = is_whole(M, 2) and is_whole(shift, M)
        joint = [(f"shift={shift}", f"0 to {M - 1} (below M), or alternate")] if too_far else []
        return super().faults(declared, arguments) + joint


@dataclass(frozen=True)
class Dilated(Value):
    """A position sees at most M x M kernels spread over the whole grid: those whose row and column differ from its own
    by multiples of ceil(H / M) and ceil(W / M) (the grid attention of MaxViT, arXiv 2204.01697). A relative table
    counts offsets in these steps."""

    word: ClassVar[str] = "grid"
    M: int = argument(whole(2))


@dataclass(frozen=True)
class Neighborhood(Value):
    """A position sees the M x M kernels around it, M odd, shifted inward at borders (NAT, arXiv 2204.07143)."""

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
    """A learned matrix (generated kernels) x r mixes the kernels into r, which are stacked (Linformer, arXiv
    2006.04768). Keys and values have a matrix each, or share one (`shared`)."""

    word: ClassVar[str] = "project"
    r: int = argument(COUNT)
    shared: bool = argument(SWITCH, False)


@dataclass(frozen=True)
class Predict(Value):
    """Mix K kernels into one by coefficients predicted from the pooled image: gate(logits / tau). `r` is the
    reduction of the predictor's bottleneck, None for a linear predictor."""

    word: ClassVar[str] = "predict"
    gate: Literal["softmax", "sigmoid"] = argument(one_of("softmax", "sigmoid"))
    tau: float = argument(POSITIVE, 1.0)
    r: int | None = argument(REDUCTION, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tau", float(self.tau))


@dataclass(frozen=True)
class TwoStep(Value):
    """C_in -> 1 per kernel, activation, 1 -> C_out per kernel, in `heads` groups (paper, section 4.2).

    Args:
        heads: The number of heads; ``host`` is that of the model.
        norm: How the operand and the first kernels of a dynamic bank are normalised over the channels of a head, each
            tap by itself: ``layernorm`` (ViT-22B, arXiv 2302.05442) and ``rmsnorm`` have learned scales; ``l2`` makes
            the scores cosines (Swin V2, arXiv 2111.09883).
        scale: What the scores are multiplied by: ``fixed`` is 1 / sqrt(d), ``learned`` is a number per head, at most
            100 (Swin V2).
    """

    word: ClassVar[str] = "two_step"
    heads: int | Channels | Literal["host"] = argument(HEADS, HOST)
    norm: Literal["none", "layernorm", "rmsnorm", "l2"] = argument(one_of("none", "layernorm", "rmsnorm", "l2"), "none")
    scale: Literal["fixed", "learned"] = argument(one_of("fixed", "learned"), "fixed")

    @property
    def plain(self) -> bool:
        """Whether nothing is normalised and the scale is fixed."""
        return self.norm == "none" and self.scale == "fixed"


@dataclass(frozen=True)
class Full(Value):
    """C_in -> C_out, in `groups` groups."""

    word: ClassVar[str] = "full"
    groups: int | Channels | Literal["host"] = argument(CHANNEL_GROUPS, 1)


@dataclass(frozen=True)
class Depthwise(Value):
    """One weight per channel and tap."""

    word: ClassVar[str] = "depthwise"


@dataclass(frozen=True)
class Grouped(Value):
    """Depth-wise with one weight per group and tap, shared by the channels of a group (involution, arXiv
    2103.06255)."""

    word: ClassVar[str] = "grouped"
    G: int | Channels | Literal["host"] = argument(CHANNEL_GROUPS)


@dataclass(frozen=True)
class NoPosition(Value):
    """Nothing is added for where a kernel was generated."""

    word: ClassVar[str] = "none"


@dataclass(frozen=True)
class Relative(Value):
    """A learned table over the offsets i - j, per head (Shaw et al., arXiv 1803.02155; Swin, arXiv 2103.14030)."""

    word: ClassVar[str] = "relative"


@dataclass(frozen=True)
class Rope(Value):
    """Pairs of channels of the operand and of the kernels are rotated by angles that are proportional to the row and
    the column, so that a score depends on the offset (arXiv 2104.09864; in two dimensions EVA-02, arXiv 2303.11331, and
    Heo et al., arXiv 2403.13298). Prefix tokens are not rotated.

    With d channels per head and f = d / 4, the angles of a position are theta^(-k/f) times its first coordinate for
    k = 0 ... f-1, then the same times the second.

    Args:
        theta: The base of the frequencies.
        layout: The pairs of channels. ``interleaved`` is (0, 1), (2, 3), ...; ``half`` is (0, d/2), (1, d/2 + 1), ...
        coordinates: ``index`` counts rows and columns from `origin`. ``unit`` is 2 pi times the centre of the position
            on an image from -1 to 1 (DINOv3, arXiv 2508.10104).
        axes: The order of the coordinates, ``yx`` or ``xy``.
        origin: The index of the first row and column.
        side: Indices are multiplied by side / H and side / W (EVA-02's scaling to the grid of pre-training); ``grid``
            does not scale them.
    """

    word: ClassVar[str] = "rope"
    theta: float = argument(POSITIVE, 10000.0)
    layout: Literal["interleaved", "half"] = argument(one_of("interleaved", "half"), "interleaved")
    coordinates: Literal["index", "unit"] = argument(one_of("index", "unit"), "index")
    axes: Literal["yx", "xy"] = argument(one_of("yx", "xy"), "yx")
    origin: int = argument(whole(0), 0)
    side: int | Literal["grid"] = argument(either(COUNT, one_of("grid")), "grid")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "theta", float(self.theta))

    @classmethod
    def faults(cls, declared: Iterable[Field[Any]], arguments: Mapping[str, Any]) -> list[Fault]:
        joint = []
        if arguments["coordinates"] == "unit" and arguments["origin"] != 0:
            joint.append((f"origin={arguments['origin']}", "0 with coordinates=unit"))
        if arguments["coordinates"] == "unit" and arguments["side"] != "grid":
            joint.append((f"side={arguments['side']}", "grid with coordinates=unit"))
        return super().faults(declared, arguments) + joint


# ---- axes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One field of a spec: how its text is read and printed, what is expected in words, and example values that
    stand for every word of the axis (errors list the valid ones, and tests run through them).

    `read` and `accepts` take the text and the value; `read` raises SpecError.
    """

    name: str
    expected: str
    read: Callable[[str], Any]
    accepts: Callable[[object], bool]
    examples: tuple[Any, ...]
    show: Callable[[Any], str] = show_argument


def _read_arguments(kind: type[Value], inside: str) -> dict[str, object]:
    """The arguments of a value, positional ones first, then named ones, with the defaults of those left out.

    Raises: _Fault: If an argument is unknown, repeated, missing or invalid.
    """
    declared, given = {f.name: f for f in fields(kind)}, dict[str, object]()
    written, named_before = kind.signature(), False
    for position, part in enumerate(split(inside, ",") if inside else []):
        name, named, text = part.partition("=")
        if not named:
            if position >= len(declared) or named_before:
                raise _Fault(f"{part!r} is one argument too many" if position >= len(declared)
                             else f"{part!r} follows a named argument", written)  # fmt: skip
            name, text = list(declared)[position], part
        named_before = bool(named)
        if name not in declared:
            raise _Fault(f"unknown argument {name!r}{suggest(name, declared)}", written)
        if name in given:
            raise _Fault(f"{name} is given twice", written)
        kind_of_argument: Argument = declared[name].metadata["argument"]
        try:
            given[name] = kind_of_argument.read(text)
        except ValueError:
            raise _Fault(f"{name}={text}", kind_of_argument.expected) from None
    for name, f in declared.items():
        if given.setdefault(name, f.default) is MISSING:
            raise _Fault(f"{name} is missing", written)
    return given


class _Fault(Exception):
    """What is wrong with a value's arguments, and what is expected."""


def _choice(name: str, *examples: Value) -> Axis:
    """An axis whose values are words with arguments."""
    kinds = {type(example).word: type(example) for example in examples}
    expected = ", ".join(kind.signature() for kind in kinds.values())

    def read(text: str) -> Value:
        word, inside = split_call(name, text)
        if word not in kinds:
            raise SpecError(f"invalid {name}={text}{suggest(word, kinds)}; expected {expected}")
        kind = kinds[word]
        if inside == "":
            raise SpecError(f"invalid {name}={text}: empty parentheses; expected {kind.signature()}")
        try:
            arguments = _read_arguments(kind, inside or "")
            for fault in kind.faults(fields(kind), arguments):
                raise _Fault(*fault)
        except _Fault as fault:
            reason, instead = fault.args
            raise SpecError(f"invalid {name}={text}: {reason}; expected {instead}") from None
        return kind(**arguments)

    return Axis(name, expected, read, lambda v: type(v) in kinds.values(), examples)


def _closed(name: str, *options: str) -> Axis:
    """An axis whose values are plain words."""

    def read(text: str) -> str:
        if text not in options:
            raise SpecError(f"invalid {name}={text}{suggest(text, options)}; expected {', '.join(options)}")
        return text

    return Axis(name, ", ".join(options), read, lambda v: v in options, options)


def _odd(value: object) -> bool:
    return is_whole(value, 1) and value % 2 == 1


def _read_size(text: str) -> int:
    try:
        value = read_whole(text)
    except ValueError:
        value = 0
    if not _odd(value):
        raise SpecError(f"invalid size={text}; expected 1, 3, 5, 7, ...")
    return value


def _read_bias(text: str) -> bool:
    try:
        return read_switch(text)
    except ValueError:
        raise SpecError(f"invalid bias={text}; expected True, False") from None


def _is_pipeline(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(step, Step) for step in value)


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        _choice("bank", Dynamic(), Dynamic(4), Dynamic(stride=2), Static(1), Static(4), Box()),
        _choice("support", All(), Window(7), Dilated(7), Neighborhood(7), Own()),
        _choice("mix", Stack(), Mean(), Pool(), Project(64), Predict("softmax")),
        _choice("kernel", TwoStep(), Full(), Depthwise(), Grouped(1), Grouped(2)),
        Axis("size", "1, 3, 5, 7, ...", _read_size, _odd, (1, 3)),
        Axis("activation", "steps separated by commas, or none", read_pipeline, _is_pipeline,
             (softmax(), ()), show_pipeline),
        _choice("position", NoPosition(), Relative(), Rope()),
        _closed("frame", "linear", "bn_relu", "bare"),
        Axis("bias", "True, False", _read_bias, lambda v: isinstance(v, bool), (True, False)),
    )
}  # fmt: skip
