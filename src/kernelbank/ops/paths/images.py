"""One predicted kernel per image. Each image is convolved separately in channels-last format, where one grouped
convolution over all images is slower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.geometry import to_grid
from kernelbank.ops.machine import Machine
from kernelbank.ops.mix import learned_kernel
from kernelbank.ops.paths.framed import framed
from kernelbank.ops.paths.path import MixerPath, Reason
from kernelbank.spec import Full, Grouped, Predict


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The mixed kernel (B, C_out, C_in/g, k, k) of a predict spec, image by image."""
    weight, bias = learned_kernel(source_BTC, p, s)
    P, k, maps = s.geo.prefix, s.spec.size, to_grid(operand_BTC, s.geo)
    # torch's own float64 convolution returns wrong weight gradients for channels-last groups (2.14); oneDNN's does not.
    by_onednn = operand_BTC.dtype in (torch.float32, torch.bfloat16)
    layout = torch.channels_last if by_onednn else torch.contiguous_format
    if operand_BTC.shape[0] == 0:  # no image, no kernel: their sum keeps the graph
        return operand_BTC * weight.sum()
    images = []
    for b in range(operand_BTC.shape[0]):
        kernel = weight[b].contiguous(memory_format=layout)
        offset = None if bias is None else bias[b]
        image = maps[b : b + 1].contiguous(memory_format=layout)
        y = F.conv2d(image, kernel, offset, padding=k // 2, groups=s.groups)
        y = y.permute(0, 2, 3, 1).reshape(1, -1, s.dim)
        if P:
            centre = weight[b, :, :, k // 2, k // 2, None]
            first = F.conv1d(operand_BTC[b : b + 1, :P].transpose(1, 2), centre, offset, groups=s.groups)
            y = torch.cat([first.transpose(1, 2), y], 1)
        images.append(y)
    return torch.cat(images)


WIDE = 400
"""Positions above which one convolution per image is faster than one grouped convolution (docs/performance.md)."""


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: kernels that are not predicted, and traced batches, whose size may change."""
    if not isinstance(s.spec.mix, Predict) or isinstance(s.spec.kernel, Grouped):
        return "it runs kernels that are predicted per image, full or depthwise"
    return "a compiler unrolls its images" if call.compiling else None


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for full kernels on wide maps, on CPUs."""
    wide = isinstance(s.spec.kernel, Full) and s.geo.grid[0] * s.geo.grid[1] > WIDE
    return "wide maps channels-last, image by image" if wide and call.device == "cpu" and not call.transformed else None


PATH = MixerPath("images", framed(one_step), unsupported, preferred)
