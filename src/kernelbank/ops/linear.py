"""Three forms of linear layers on tokens, x W^T + b (static convolutions of size 1). Their speed depends on the
machine.

`plain` is the definition. `conv1x1` uses oneDNN's kernels through a convolution on a channels-last view of the tokens,
with autograd and without a copy. `onednn` is torch's fused linear. It has no autograd and is private, so that it is
used only if a trial of it succeeded (`machine.probe`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[..., Tensor]
"""(x (..., C), weight (O, C), bias (O) or None, gelu=False) -> (..., O), through the exact GELU if asked."""


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """F.linear."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """A 1 x 1 convolution over the tokens as a (1, C, tokens, 1) map that is channels-last in memory already."""
    if x.numel() == 0:
        return plain(x, weight, bias, gelu)
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return F.gelu(y) if gelu else y


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """oneDNN's linear with the GELU in its epilogue."""
    if x.numel() == 0:
        return plain(x, weight, bias, gelu)
    after: tuple[str, list[float], str] = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, *after)


FORMS: dict[str, Linear] = {"linear": plain, "conv1x1": conv1x1, "mkldnn": onednn}
