"""The specs that a convolution of a ConvNet can have, and its sizes and padding (see `nn.dynamic_conv`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from timm.layers import Conv2dSame
from torch import nn

from kernelbank.ops.kernel import Pair
from kernelbank.spec import AXES, All, Box, Depthwise, Dynamic, Full, MixerSpec, NoPosition, SpecError, Static, TwoStep
from kernelbank.spec.arguments import COUNT
from kernelbank.spec.inventory import Tensor as Entry
from kernelbank.spec.inventory import groups, inventory
from kernelbank.spec.text import words

TENSORFLOW: Literal["tensorflow"] = "tensorflow"
Padding = Pair | Literal["tensorflow"]
Sides = int | tuple[int, ...] | str

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""The padding modes of nn.Conv2d, and their names in F.pad."""

PADDINGS: dict[Callable[..., object], Callable[[nn.Conv2d], Sides]] = {
    nn.Conv2d.forward: lambda conv: conv.padding,
    Conv2dSame.forward: lambda conv: TENSORFLOW,
}
"""The forwards of convolutions that can become dynamic, and their padding. A subclass with another forward may
transform its weight, for example standardise it, and is not accepted."""


# ---- the spec ------------------------------------------------------------------------------------------


class Requirement(NamedTuple):
    """A requirement on a field of a spec: whether a spec violates it, the reason, and what is expected."""

    field: str
    violated: Callable[[MixerSpec], bool]
    reason: str
    expected: str


REQUIREMENTS = (
    Requirement(
        "kernel", lambda s: isinstance(s.kernel, TwoStep), "a convolution applies one kernel", "full, depthwise"
    ),
    Requirement(
        "bank", lambda s: isinstance(s.bank, Box) or s.bank == Static(1), "one kernel for all images is not dynamic",
        "static(K) with K > 1, dynamic(r)",
    ),
    Requirement("support", lambda s: not isinstance(s.support, All), "a kernel depends on the whole image", "all"),
    Requirement(
        "position", lambda s: not isinstance(s.position, NoPosition), "a convolution has no table of offsets", "none"
    ),
    Requirement(
        "frame", lambda s: s.frame != "bare", "the layers around a convolution belong to the network", "bare"
    ),
)  # fmt: skip
"""The requirements on a convolution with one kernel per image."""

START_REQUIREMENTS = (
    Requirement(
        "bank", lambda s: isinstance(s.bank, Dynamic) and s.bank.squash != "identity",
        "a squashed weight cannot be the convolution's", "dynamic(r)",
    ),
    Requirement(
        "bias", lambda s: isinstance(s.bank, Dynamic) and not s.bias,
        "the generator's bias holds the convolution's kernel", "True",
    ),
)  # fmt: skip
"""Further requirements on a spec that starts out equal to a convolution."""


def checked(spec: MixerSpec, requirements: tuple[Requirement, ...]) -> MixerSpec:
    """Return `spec`. Raises SpecError if it violates a requirement."""
    for requirement in requirements:
        if requirement.violated(spec):
            value = AXES[requirement.field].show(getattr(spec, requirement.field))
            raise SpecError(
                f"invalid {requirement.field}={value}: {requirement.reason}; expected {requirement.expected}"
            )
    return spec


def _typed(text: str) -> set[str]:
    return {word.partition("=")[0] for word in words(text) if "=" in word}


def read_conv_spec(text: str) -> MixerSpec:
    """Return the spec of `text`, with a bare frame unless `text` states one: a row's frame stands for layers that a
    ConvNet has itself. Raises SpecError for a spec without one kernel per image."""
    spec = MixerSpec.parse(text)
    if "frame" not in _typed(text):
        spec = replace(spec, frame="bare")
    return checked(spec, REQUIREMENTS)


def read_start(text: str) -> MixerSpec:
    """Return the spec as `read_conv_spec`. Raises SpecError if it cannot start out equal to a convolution."""
    return checked(read_conv_spec(text), START_REQUIREMENTS)


def conv_spec(conv: nn.Module, text: str) -> MixerSpec:
    """Return the spec of `text` with the kernel and size of `conv`: groups 1 is full, groups C is depthwise.

    Raises:
        SpecError: If `text` states another kernel or size, no spec has the convolution's, or `conv` is not plain.
    """
    spec, typed = read_start(text), _typed(text)
    check_plain(conv)
    assert isinstance(conv, nn.Conv2d)
    (high, wide), C = conv.kernel_size, conv.in_channels
    if high != wide or not AXES["size"].accepts(high):
        raise SpecError(f"its kernel is {high} x {wide}: the size of a spec is an odd square")
    if "size" in typed and spec.size != high:
        raise SpecError(f"size={spec.size} is typed, its kernel is {high} x {wide}")
    own = Depthwise() if conv.groups == C > 1 else Full(conv.groups)
    if "kernel" in typed and (type(spec.kernel) is not type(own) or groups(spec, C, 1) != conv.groups):
        raise SpecError(f"kernel={AXES['kernel'].show(spec.kernel)} is typed, its kernel is {own}")
    if isinstance(spec.bank, Dynamic) and not isinstance(own, Depthwise):
        raise SpecError(f"its kernel is {own}: bank={spec.bank} generates depth-wise kernels only")
    kernel = spec.kernel if "kernel" in typed else own
    spec = spec.override(kernel=str(kernel), size=str(high))
    tuple(conv_entries(spec, C, conv.out_channels, conv.bias is not None))
    return spec


def check_plain(conv: nn.Module) -> None:
    """Raise SpecError, with the reason, unless a new module can replace `conv`."""
    if not isinstance(conv, nn.Conv2d):
        raise SpecError(f"a {type(conv).__name__} is not an nn.Conv2d")
    if (
        "forward" in vars(conv)
        or type(conv).forward not in PADDINGS
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise SpecError(f"a {type(conv).__name__} has a forward of its own")
    if not {"weight", "bias"} <= conv._parameters.keys():
        raise SpecError("its weight is parametrised or pruned")
    if isinstance(conv.weight, nn.UninitializedParameter):
        raise SpecError("its weight has no shape before a first forward")
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        raise SpecError("it has hooks, which a new module would not have")


# ---- sizes and padding ---------------------------------------------------------------------------------------------


def conv_entries(spec: MixerSpec, in_channels: int, out_channels: int, biased: bool) -> Iterator[Entry]:
    """The spec's inventory at C_in, its kernels with C_out outputs, and a bias of the kernels if `biased`."""
    listed = {entry.name: entry for entry in inventory(spec, in_channels, 1, (1, 1))}
    parts = groups(spec, in_channels, 1)
    if not COUNT.accepts(out_channels) or out_channels % parts:
        raise SpecError(f"invalid out_channels={out_channels}; expected a multiple of its {parts} groups")
    if isinstance(spec.bank, Dynamic):
        if out_channels != in_channels:
            raise SpecError(
                f"invalid out_channels={out_channels}: bank={spec.bank} generates one kernel per channel; "
                f"expected {in_channels}"
            )
        bias = Entry("bias", (out_channels,), "zeros")
    else:
        weight = listed.pop("weight")
        listed.pop("bias", None)
        weight = replace(weight, shape=(weight.shape[0], out_channels, *weight.shape[2:]))
        bias = Entry("bias", weight.shape[:2], "uniform", weight.fan_in)
        yield weight
    if biased:
        yield bias
    yield from listed.values()


def pair(name: str, value: int | tuple[int, ...]) -> Pair:
    """A number or a pair as a pair. Raises SpecError unless both are whole numbers >= 1."""
    sides = (value, value) if isinstance(value, int) else value
    if len(sides) != 2 or not all(COUNT.accepts(side) for side in sides):
        raise SpecError(f"invalid {name}={value!r}; expected {COUNT.expected}, or a pair")
    return sides[0], sides[1]


def padding_of(value: Sides, size: int, dilation: Pair) -> Padding:
    """`value` as the zeros on each side, a (high, wide) pair, or ``tensorflow``."""
    match value:
        case "tensorflow":
            return TENSORFLOW
        case "valid":
            return 0, 0
        case "same":
            return dilation[0] * (size - 1) // 2, dilation[1] * (size - 1) // 2
        case int() if value >= 0:
            return value, value
        case (int(high), int(wide)) if high >= 0 and wide >= 0:
            return high, wide
    raise SpecError(f"invalid padding={value!r}; expected a whole number >= 0, a pair, same, valid, {TENSORFLOW}")
