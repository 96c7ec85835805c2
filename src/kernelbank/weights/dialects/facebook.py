"""facebookresearch/deit at 7e160fe, which has timm's names except for LayerScale (models_v2.py), and
facebookresearch/dinov2 (dinov2/models/vision_transformer.py), which has them except for registers. DINO, MAE, and
DINOv2 without registers have timm's names."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from kernelbank.model import ModelSpec
from kernelbank.weights.changes import REGISTERS
from kernelbank.weights.dialects.dialect import Dialect, Library
from kernelbank.weights.dialects.timm import FIRST
from kernelbank.weights.keymap import Names, key_map, rule
from kernelbank.weights.pivot import BLOCK, VIT

_NAMES: Names = VIT | {f"{BLOCK}.ls1.gamma": f"{BLOCK}.gamma_1", f"{BLOCK}.ls2.gamma": f"{BLOCK}.gamma_2"}

_DINOV2 = key_map({timm: name for timm, name in VIT.items() if timm not in ("reg_token", "pos_embed")})
_REGISTERS = rule(("register_tokens", "pos_embed"), ("reg_token", "pos_embed"), REGISTERS)


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    raise ImportError("the repository is not a package")


DIALECTS = (
    Dialect(
        name="facebook", family="vit", library=Library(install="only keys and shapes are checked", build=_build),
        keys=key_map(_NAMES), marks=(f"{FIRST}.qkv.weight", "blocks.0.gamma_1"),
    ),
    Dialect(
        name="facebook-registers", family="vit", keys=replace(_DINOV2, rules=(_REGISTERS, *_DINOV2.rules)),
        library=Library(install="only keys and shapes are checked", build=_build),
        marks=(f"{FIRST}.qkv.weight", "register_tokens"),
    ),
)  # fmt: skip
