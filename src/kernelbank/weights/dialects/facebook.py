"""facebookresearch/deit at 7e160fe, which has timm's names except for LayerScale (models_v2.py)."""

from __future__ import annotations

from torch import nn

from kernelbank.model import ModelSpec
from kernelbank.weights.dialects.dialect import Dialect, Library
from kernelbank.weights.dialects.timm import FIRST
from kernelbank.weights.keymap import Names, key_map
from kernelbank.weights.pivot import BLOCK, VIT

_NAMES: Names = VIT | {f"{BLOCK}.ls1.gamma": f"{BLOCK}.gamma_1", f"{BLOCK}.ls2.gamma": f"{BLOCK}.gamma_2"}


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    raise ImportError("facebookresearch/deit is not a package")


DIALECTS = (
    Dialect(
        name="facebook", family="vit", library=Library(install="only keys and shapes are checked", build=_build),
        keys=key_map(_NAMES), marks=(f"{FIRST}.qkv.weight", "blocks.0.gamma_1"),
    ),
)  # fmt: skip
