"""timm, whose names of VisionTransformer and SwinTransformer are the pivot."""

from __future__ import annotations

from torch import nn

from kernelbank.model import ModelSpec
from kernelbank.weights.dialects.dialect import Dialect, Library
from kernelbank.weights.keymap import key_map
from kernelbank.weights.pivot import SWIN, VIT
from kernelbank.weights.stock import build_stock

PATCHES, FIRST, FIRST_OF_STAGE = "patch_embed.proj.weight", "blocks.0.attn", "layers.0.blocks.0.attn"
MERGED_FIRST = "layers.0.downsample.reduction.weight"
"""The names in a Swin whose patch merging is at the end of a stage (microsoft, and timm before 0.8) and not at the
start of the next one."""


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    model: nn.Module = build_stock(spec)
    return model


_TIMM = Library(install="install timm", build=_build)
DIALECTS = (
    Dialect(
        name="timm", family="vit", library=_TIMM, keys=key_map(VIT), marks=(f"{FIRST}.qkv.weight", PATCHES),
        unmarked=("blocks.0.gamma_1", "register_tokens"),
    ),
    Dialect(
        name="timm", family="swin", library=_TIMM, keys=key_map(SWIN), unmarked=(MERGED_FIRST,), pad="timm",
        marks=(f"{FIRST_OF_STAGE}.qkv.weight", PATCHES),
    ),
)  # fmt: skip
