"""microsoft/Swin-Transformer at f82860b (models/swin_transformer.py), and timm's own files before 0.8."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from torch import nn

from kernelbank.model import ModelSpec
from kernelbank.weights.buffers import attn_masks, indices
from kernelbank.weights.dialects.dialect import Dialect, Library
from kernelbank.weights.dialects.timm import FIRST_OF_STAGE, MERGED_FIRST
from kernelbank.weights.keymap import Names, key_map
from kernelbank.weights.pivot import STAGE_BLOCK, SWIN
from kernelbank.weights.stock import one_of_all, stock_arguments

_NAMES: Names = {
    **{timm: name for timm, name in SWIN.items() if ".downsample." not in timm},
    "layers.{i+1}.downsample.norm.{p}": "layers.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "layers.{i}.downsample.reduction.weight",
    "head.fc.{p}": "head.{p}",
}  # fmt: skip


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    arguments = stock_arguments(spec)
    model: nn.Module = _module().SwinTransformer(
        img_size=spec.image, patch_size=arguments["patch_size"][0], in_chans=spec.in_chans,
        num_classes=spec.num_classes, embed_dim=arguments["embed_dim"], depths=list(arguments["depths"]),
        num_heads=list(arguments["num_heads"]), window_size=one_of_all(arguments["window_size"], "window_size")[0],
        mlp_ratio=arguments["mlp_ratio"], qkv_bias=arguments["qkv_bias"],
    )  # fmt: skip
    return model


def _module() -> ModuleType:
    """Import models/swin_transformer.py of the repository if its root is on the path. The package around the file is
    not imported."""
    package = PathFinder.find_spec("models", sys.path)
    for folder in (package.submodule_search_locations if package else None) or ():
        path = Path(folder) / "swin_transformer.py"
        if path.is_file() and "class SwinTransformer(" in path.read_text(encoding="utf-8"):
            spec = importlib.util.spec_from_file_location("microsoft_swin_transformer", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("no models/swin_transformer.py")


DIALECTS = (
    Dialect(
        name="microsoft", family="swin", keys=key_map(_NAMES), marks=(f"{FIRST_OF_STAGE}.qkv.weight", MERGED_FIRST),
        library=Library(install="install microsoft/Swin-Transformer: its folder on PYTHONPATH", build=_build),
        derived={f"{STAGE_BLOCK}.attn.relative_position_index": indices, f"{STAGE_BLOCK}.attn_mask": attn_masks},
    ),
)  # fmt: skip
