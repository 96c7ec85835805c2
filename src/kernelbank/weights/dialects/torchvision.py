"""torchvision 0.26 and later, torchvision/models/swin_transformer.py: stages and patch mergings alternate in
``features``."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.weights.buffers import flat_indices
from kernelbank.weights.dialects.dialect import Dialect, Library, need
from kernelbank.weights.keymap import Names, key_map
from kernelbank.weights.pivot import STAGE_BLOCK
from kernelbank.weights.stock import one_of_all, stock_arguments

_BLOCK = "features.{2i+1}.{j}"
_NAMES: Names = {
    "patch_embed.proj.{p}": "features.0.0.{p}",
    "patch_embed.norm.{p}": "features.0.2.{p}",
    "layers.{i+1}.downsample.norm.{p}": "features.{2i+2}.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "features.{2i+2}.reduction.weight",
    **{f"{STAGE_BLOCK}.{name}": f"{_BLOCK}.{name}" for name in (
        "norm1.{p}", "attn.qkv.{p}", "attn.proj.{p}", "attn.relative_position_bias_table", "norm2.{p}")},
    f"{STAGE_BLOCK}.mlp.fc1.{{p}}": f"{_BLOCK}.mlp.0.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc2.{{p}}": f"{_BLOCK}.mlp.3.{{p}}",
    "norm.{p}": "norm.{p}",
    "head.fc.{p}": "head.{p}",
}  # fmt: skip


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("torchvision")
    arguments = stock_arguments(spec)
    window = one_of_all(arguments["window_size"], "window_size")[0]
    grids = [stage.grid for stage in spec.stages]
    if any(window > min(grid) for grid in grids):
        raise InputError(f"invalid window {window} for torchvision, which does not cut windows; expected at most the "
                         f"grids {grids}")  # fmt: skip
    model: nn.Module = import_module("torchvision.models.swin_transformer").SwinTransformer(
        list(arguments["patch_size"]), arguments["embed_dim"], list(arguments["depths"]),
        list(arguments["num_heads"]), [window, window], arguments["mlp_ratio"], num_classes=max(spec.num_classes, 1),
    )  # fmt: skip
    if not spec.num_classes:
        model.head = nn.Identity()
    return model


DIALECTS = (
    Dialect(
        name="torchvision", family="swin", library=Library(install="install torchvision", build=_build),
        keys=key_map(_NAMES), marks=("features.0.0.weight", "features.1.0.attn.qkv.weight"),
        derived={f"{_BLOCK}.attn.relative_position_index": flat_indices}, pad="mmpretrain",
    ),
)  # fmt: skip
