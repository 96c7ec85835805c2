"""`DynamicConv2d`: a convolution with one kernel per image, as a spec describes it.

The spec states where the kernel comes from (`bank`, `mix`), how it is applied (`kernel`, `size`) and whether its
predictors have a bias (`bias`). The output channels, stride, padding, dilation, padding mode and the bias of the
kernels are arguments, as in nn.Conv2d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from kernelbank.nn.conv_spec import (
    PAD_MODES,
    PADDINGS,
    REQUIREMENTS,
    TENSORFLOW,
    Sides,
    checked,
    conv_entries,
    conv_spec,
    padding_of,
    pair,
    read_conv_spec,
)
from kernelbank.nn.linears import called_modules, linear_names, named_tensors
from kernelbank.nn.mixer import Tempered, initialise_tensor
from kernelbank.ops.context import Context
from kernelbank.ops.frame import linear_dtype
from kernelbank.ops.geometry import Geometry
from kernelbank.ops.kernel import Pair, conv_images
from kernelbank.ops.mix import generated_kernel, learned_kernel
from kernelbank.spec import (
    MixerSpec,
    Predict,
    SpecError,
    Static,
)
from kernelbank.spec.inventory import groups


class DynamicConv2d(Tempered):
    """A dynamic convolution: y_b = conv2d(x_b; W_b) + b_b, with a kernel W_b for each image x_b of (B, C_in, H, W).

    - Bank ``static(K)`` with mix ``predict``: W_b = sum_k pi_bk W_k and b_b = sum_k pi_bk b_k, where pi_b is
      softmax(z_b / tau) or sigmoid(z_b / tau) and z_b is predicted from the mean of x_b over its positions (D-Conv,
      arXiv 1912.03458; CondConv, arXiv 1904.04971).
    - Bank ``dynamic`` with mix ``pool`` or ``mean``, depth-wise: W_b is generated from that mean, or is the mean of the
      kernels generated at all positions; b_b = b is learned (D-DW-Conv, arXiv 2106.04263).

    Parameters have the names of the inventory: weight (K, C_out, C_in/g, k, k), bias (K, C_out), reduce, predict; or
    reduce, key, bias (C_out).

    Args:
        spec: A spec or its text. Its frame is bare; the frame of a row does not apply.
        padding: A number, a pair, ``same``, ``valid``, or ``tensorflow``, which pads with zeros to ceil(H / stride)
            outputs, as timm's Conv2dSame.

    Attributes:
        temperature: Replaces tau in training if it is set. Not in the state dict.

    Raises:
        SpecError: For a spec without one kernel per image, and for sizes that do not fit.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    reduce: nn.Linear
    key: nn.Linear
    predict: nn.Linear

    def __init__(
        self,
        spec: MixerSpec | str,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: Sides = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = checked(read_conv_spec(spec) if isinstance(spec, str) else spec, REQUIREMENTS)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.entries = tuple(conv_entries(self.spec, in_channels, out_channels, bias))
        self.groups = groups(self.spec, in_channels, 1)
        self.kernel_size = (self.spec.size, self.spec.size)
        self.stride, self.dilation = pair("stride", stride), pair("dilation", dilation)
        self.padding = padding_of(padding, self.spec.size, self.dilation)
        if padding_mode not in PAD_MODES:
            raise SpecError(f"invalid padding_mode={padding_mode!r}; expected {', '.join(PAD_MODES)}")
        self.padding_mode = padding_mode
        self.linears = linear_names(self.entries)
        shapes = {entry.name: entry.shape for entry in self.entries}
        for name in ("weight", "bias"):
            tensor = torch.empty(shapes[name], device=device, dtype=dtype) if name in shapes else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        for name in self.linears:
            out, of = shapes[f"{name}.weight"]
            self.add_module(name, nn.Linear(of, out, f"{name}.bias" in shapes, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Module, text: str) -> Self:
        """Return a dynamic convolution that computes the same as `conv` until it is trained.

        It has the kernel type and the size of `conv`, and its device, dtype, training mode and requires_grad. The
        output is the same, in training too, because the kernel of every image is W for any routing:

        - softmax: every W_k = W, and the coefficients sum to one.
        - sigmoid: the coefficients do not sum to one, and the spec has no step that would normalise them. The routing
          layer is therefore initialised in pairs z and -z, and 0 for an odd one. Since sigma(z) + sigma(-z) = 1, the
          coefficients sum to K / 2 for every image, and every W_k = W / (K / 2). Training does not keep the pairs.
        - generated: the last layer of the generator has weight 0 and bias W. The layers before it get a gradient from
          the second step on.

        The other layers are initialised as nn.Linear. With equal coefficients all experts would get the same gradient
        and stay equal, so the routing is random. The rows of the bottleneck get the sign that is positive on a constant
        positive image: otherwise all units of a narrow bottleneck could be dead, and all images be routed alike.

        Raises:
            SpecError: If the spec cannot describe the convolution, or if `conv` is neither a plain nn.Conv2d nor timm's
                Conv2dSame.
        """
        spec = conv_spec(conv, text)
        assert isinstance(conv, nn.Conv2d)
        new = cls(
            spec,
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride,
            padding=PADDINGS[type(conv).forward](conv),
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        new._start_as(conv.weight, conv.bias)
        return new.train(conv.training)

    @torch.no_grad()
    def _start_as(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make every image's kernel `weight` (C_out, C_in/g, k, k) and bias `bias` (C_out)."""
        share = 1.0
        if hasattr(self, "reduce"):
            _make_positive(self.reduce)
        if self.weight is None:
            self.key.weight.zero_()
            self.key.bias.copy_(weight.flatten()).requires_grad_(weight.requires_grad)
        else:
            assert isinstance(self.spec.mix, Predict)
            share = SHARES[self.spec.mix.gate](self.predict)
            self.weight.copy_(weight * share).requires_grad_(weight.requires_grad)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias * share).requires_grad_(bias.requires_grad)

    def reset_parameters(self) -> None:
        """Initialise the kernels uniformly in +-1/sqrt(fan_in), as nn.Conv2d, and the layers as nn.Linear."""
        with torch.no_grad():
            for entry in self.entries:
                if entry.name in ("weight", "bias"):
                    initialise_tensor(getattr(self, entry.name), entry)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by their inventory name, as the modules hold them now; see `Mixer.tensors`."""
        return named_tensors(self, self.entries)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, H, W) -> (B, C_out, H', W'), channels-last if x is. Raises SpecError for another shape."""
        return _convolve(self.fx_argument(x), x)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The kernel of each image (B, C_out, C_in/g, k, k), and its bias (B or 1, C_out) if there is one."""
        grid = (x.shape[2], x.shape[3])
        modules = called_modules(self, self.linears)
        s = Context(
            self.spec, self.in_channels, 1, Geometry(self.spec.support, grid, 0), self.training, self.temperature,
            modules=modules,
        )  # fmt: skip
        source_BTC, p = x.flatten(2).transpose(1, 2), named_tensors(self, self.entries, modules)
        if isinstance(self.spec.bank, Static):
            return learned_kernel(source_BTC, p, s)
        kernel, _ = generated_kernel(source_BTC, p, s)  # (B, 1, C, t)
        weight = kernel.reshape(len(x), self.out_channels, 1, *self.kernel_size).to(linear_dtype(p, "key", s))
        return weight, None if self.bias is None else self.bias[None]

    def pad(self, x: Tensor) -> tuple[Tensor, Pair]:
        """Return x with the padding that F.conv2d does not have, and the zero padding that is left to F.conv2d."""
        if self.padding == TENSORFLOW:
            return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), (0, 0)
        if self.padding_mode == "zeros":
            return x, self.padding
        high, wide = self.padding
        return F.pad(x, (wide, wide, high, high), PAD_MODES[self.padding_mode]), (0, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to 5-D parameters as 4-D ones, since Module.to(memory_format=channels_last) also converts 5-D
        parameters, to a format for 4-D tensors."""
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.ndim == 5 else fn(t), recurse
        )
        return self

    def extra_repr(self) -> str:
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
        shown = [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        biased = [] if self.bias is not None else ["bias=False"]
        return ", ".join([repr(str(self.spec)), str(self.in_channels), str(self.out_channels), *shown, *biased])


# A leaf of torch.fx, since values that depend on the shape and device of an image must not be traced.
torch.fx.wrap("_convolve")


def _convolve(conv: DynamicConv2d, x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        raise SpecError(f"invalid x of shape {tuple(x.shape)}; expected (B, C, H, W) with C = {conv.in_channels}")
    weight, bias = conv.kernels(x)
    padded, padding = conv.pad(x)
    y = conv_images(padded, weight, bias, conv.groups, padding, conv.stride, conv.dilation)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last) if last else y


# ---- initialisation -------------------------------------------------------------------------------------------


def _make_positive(reduce: nn.Linear) -> None:
    """Flip the rows of a layer so that it is positive on ones."""
    sign = torch.where(reduce(reduce.weight.new_ones(1, reduce.in_features)) < 0, -1.0, 1.0)[0]
    reduce.weight.mul_(sign[:, None])
    if reduce.bias is not None:
        reduce.bias.mul_(sign)


def _share_of_softmax(predict: nn.Linear) -> float:
    """Leave the layer as it is, since the coefficients of a softmax sum to one."""
    return 1.0


def _share_of_sigmoid(predict: nn.Linear) -> float:
    """Make the outputs pairs z, -z, and 0 for an odd one, so that the coefficients sum to K / 2."""
    K = predict.out_features
    half = K // 2
    for tensor in (predict.weight, predict.bias):
        if tensor is not None:
            tensor[half : 2 * half] = -tensor[:half]
            tensor[2 * half :] = 0
    return 2 / K


SHARES: dict[str, Callable[[nn.Linear], float]] = {"softmax": _share_of_softmax, "sigmoid": _share_of_sigmoid}
"""By gate, a function that makes the coefficients have the same sum for every image and returns one over that sum."""
