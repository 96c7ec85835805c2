"""torchvision 0.26 and later, torchvision/models/swin_transformer.py, where stages and patch mergings alternate in
``features``, and torchvision/models/vision_transformer.py."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import cast

from torch import nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, ViTTrunk
from kernelbank.weights.buffers import flat_indices
from kernelbank.weights.dialects.dialect import Dialect, Library, need
from kernelbank.weights.keymap import Names, key_map
from kernelbank.weights.pivot import BLOCK, STAGE_BLOCK
from kernelbank.weights.stock import mlp_activation, mlp_width, one_of_all, stock_arguments

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

_LAYER = "encoder.layers.encoder_layer_{i}"
_VIT: Names = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.{p}": "conv_proj.{p}",
    f"{BLOCK}.norm1.{{p}}": f"{_LAYER}.ln_1.{{p}}",
    f"{BLOCK}.attn.qkv.{{p}}": f"{_LAYER}.self_attention.in_proj_{{p}}",
    f"{BLOCK}.attn.proj.{{p}}": f"{_LAYER}.self_attention.out_proj.{{p}}",
    f"{BLOCK}.norm2.{{p}}": f"{_LAYER}.ln_2.{{p}}",
    f"{BLOCK}.mlp.fc1.{{p}}": f"{_LAYER}.mlp.0.{{p}}",
    f"{BLOCK}.mlp.fc2.{{p}}": f"{_LAYER}.mlp.3.{{p}}",
    "norm.{p}": "encoder.ln.{p}",
    "head.{p}": "heads.head.{p}",
}


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


def _build_vit(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("torchvision")
    trunk, first = cast(ViTTrunk, spec.trunk), spec.stages[0]
    sides = {*spec.image, *trunk.patch_size}
    if len(set(spec.image)) != 1 or len(set(trunk.patch_size)) != 1 or mlp_activation(first) != "gelu":
        raise InputError(f"invalid mlp={str(first.mlp)!r}, image or patches {sorted(sides)} for torchvision; expected "
                         "gelu, squares")  # fmt: skip
    model: nn.Module = import_module("torchvision.models.vision_transformer").VisionTransformer(
        spec.image[0], trunk.patch_size[0], trunk.depth, trunk.num_heads, trunk.embed_dim, mlp_width(first),
        num_classes=max(spec.num_classes, 1), norm_layer=partial(nn.LayerNorm, eps=trunk.norm_eps),
    )  # fmt: skip
    if not spec.num_classes:
        model.heads = nn.Sequential()
    return model


DIALECTS = (
    Dialect(
        name="torchvision", family="swin", library=Library(install="install torchvision", build=_build),
        keys=key_map(_NAMES), marks=("features.0.0.weight", "features.1.0.attn.qkv.weight"),
        derived={f"{_BLOCK}.attn.relative_position_index": flat_indices}, pad="mmpretrain",
    ),
    Dialect(
        name="torchvision", family="vit", library=Library(install="install torchvision", build=_build_vit),
        keys=key_map(_VIT), marks=("conv_proj.weight", f"{_LAYER.format(i=0)}.self_attention.in_proj_weight"),
        trunk={"global_pool": "token"},
    ),
)  # fmt: skip
