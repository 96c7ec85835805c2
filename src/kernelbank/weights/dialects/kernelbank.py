"""KernelBank: the backbones of this library, whose files contain their description."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kernelbank.model import ModelSpec
from kernelbank.nn.build import build_backbone
from kernelbank.weights.dialects.dialect import Dialect, Library
from kernelbank.weights.dialects.timm import FIRST, FIRST_OF_STAGE, PATCHES
from kernelbank.weights.file import save_model
from kernelbank.weights.from_timm import our_shapes
from kernelbank.weights.keymap import State
from kernelbank.weights.ours import KEYS


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    return build_backbone(spec)


def _write(path: Path, state: State, spec: ModelSpec, source: str) -> None:
    save_model(path, state, spec, source)


_OURS = Library(install="install kernelbank", build=_build, write=_write, holds_specs=True)
DIALECTS = (
    Dialect(
        name="kernelbank", family="vit", library=_OURS, keys=KEYS["vit"], marks=(f"{FIRST}.q.weight", PATCHES),
        shapes=our_shapes,
    ),
    Dialect(
        name="kernelbank", family="swin", library=_OURS, keys=KEYS["swin"], shapes=our_shapes,
        marks=(f"{FIRST_OF_STAGE}.q.weight", PATCHES),
    ),
)  # fmt: skip
