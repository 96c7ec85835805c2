"""open-mmlab/mmpretrain at ee7f2e8, models/backbones/{vision,swin}_transformer.py, with the FFN of mmcv 2.2."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from kernelbank.model import ModelSpec, SwinTrunk, ViTTrunk
from kernelbank.weights.buffers import indices
from kernelbank.weights.changes import UNFOLD
from kernelbank.weights.dialects.dialect import Dialect, Library, need
from kernelbank.weights.keymap import Changes, Names, key_map
from kernelbank.weights.pivot import BLOCK, STAGE_BLOCK, headless, under
from kernelbank.weights.stock import mlp_width, one_of_all, stock_arguments

_LAYER = "layers.{i}"
_VIT: Names = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.{p}": "patch_embed.projection.{p}",
    "norm_pre.{p}": "pre_norm.{p}",
    f"{BLOCK}.norm1.{{p}}": f"{_LAYER}.ln1.{{p}}",
    f"{BLOCK}.attn.qkv.{{p}}": f"{_LAYER}.attn.qkv.{{p}}",
    f"{BLOCK}.attn.proj.{{p}}": f"{_LAYER}.attn.proj.{{p}}",
    f"{BLOCK}.ls1.gamma": f"{_LAYER}.attn.gamma1.weight",
    f"{BLOCK}.norm2.{{p}}": f"{_LAYER}.ln2.{{p}}",
    f"{BLOCK}.mlp.fc1.{{p}}": f"{_LAYER}.ffn.layers.0.0.{{p}}",
    f"{BLOCK}.mlp.fc2.{{p}}": f"{_LAYER}.ffn.layers.1.{{p}}",
    f"{BLOCK}.ls2.gamma": f"{_LAYER}.ffn.gamma2.weight",
    "norm.{p}": "ln1.{p}",
    "fc_norm.{p}": "ln2.{p}",
    "head.{p}": "head.layers.head.{p}",
}
_STAGE = "stages.{i}.blocks.{j}"
_SWIN: Names = {
    "patch_embed.proj.{p}": "patch_embed.projection.{p}",
    "patch_embed.norm.{p}": "patch_embed.norm.{p}",
    "layers.{i+1}.downsample.norm.{p}": "stages.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "stages.{i}.downsample.reduction.weight",
    f"{STAGE_BLOCK}.norm1.{{p}}": f"{_STAGE}.norm1.{{p}}",
    f"{STAGE_BLOCK}.attn.qkv.{{p}}": f"{_STAGE}.attn.w_msa.qkv.{{p}}",
    f"{STAGE_BLOCK}.attn.proj.{{p}}": f"{_STAGE}.attn.w_msa.proj.{{p}}",
    f"{STAGE_BLOCK}.attn.relative_position_bias_table": f"{_STAGE}.attn.w_msa.relative_position_bias_table",
    f"{STAGE_BLOCK}.norm2.{{p}}": f"{_STAGE}.norm2.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc1.{{p}}": f"{_STAGE}.ffn.layers.0.0.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc2.{{p}}": f"{_STAGE}.ffn.layers.1.{{p}}",
    "norm.{p}": "norm3.{p}",
    "head.fc.{p}": "head.fc.{p}",
}
_INDEX = f"{_STAGE}.attn.w_msa.relative_position_index"
_MERGING: Changes = {key: UNFOLD for key in _SWIN if ".downsample." in key}


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("mmpretrain")
    models = import_module("mmpretrain.models")
    backbone, head, width = _configuration(spec, dialect)
    if dialect.bare:
        model: nn.Module = models.build_backbone(backbone)
        return model
    classes = {"in_channels": width, "num_classes": spec.num_classes}
    model = models.build_classifier({
        "type": "ImageClassifier", "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"} if isinstance(spec.trunk, SwinTrunk) else None,
        "head": {**head, **classes} if spec.num_classes else None,
    })  # fmt: skip
    return model


def _configuration(spec: ModelSpec, dialect: Dialect) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the configurations of the backbone and of the head, and the channels of the last stage."""
    trunk, arguments, last = spec.trunk, stock_arguments(spec), spec.stages[-1]
    shared = {"img_size": spec.image, "patch_size": arguments["patch_size"], "in_channels": spec.in_chans}
    if isinstance(trunk, ViTTrunk):
        backbone = shared | {
            "type": "VisionTransformer", "qkv_bias": arguments["qkv_bias"],
            "out_type": "avg_featmap" if trunk.global_pool == "avg" else "cls_token",
            "final_norm": trunk.final_norm and not trunk.fc_norm, "pre_norm": trunk.pre_norm,
            "with_cls_token": trunk.class_token, "layer_scale_init_value": trunk.init_values or 0.0,
            "arch": {
                "embed_dims": trunk.embed_dim, "num_layers": trunk.depth, "num_heads": trunk.num_heads,
                "feedforward_channels": mlp_width(last),
            },
        }  # fmt: skip
        kind = "LinearClsHead" if dialect.name == "mmpretrain-linear" else "VisionTransformerClsHead"
        return backbone, {"type": kind}, last.dim
    assert isinstance(trunk, SwinTrunk)
    backbone = shared | {
        "type": "SwinTransformer", "window_size": one_of_all(arguments["window_size"], "window_size")[0],
        "arch": {"embed_dims": trunk.embed_dim, "depths": list(trunk.depths), "num_heads": list(trunk.num_heads)},
    }  # fmt: skip
    return backbone, {"type": "LinearClsHead"}, last.dim


def _call(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    last: Tensor = output[-1] if isinstance(output, (tuple, list)) else output
    return last.mean((2, 3)) if last.ndim == 4 else last


_MMPRETRAIN = Library(install="install mmpretrain", build=_build, call=_call)


def _dialects() -> tuple[Dialect, ...]:
    """Return the dialects of both families, as classifiers and as backbones, and of ViT with a linear head,
    ``head.fc``."""
    first, first_of_stage = "layers.0.ln1.weight", "stages.0.blocks.0.attn.w_msa.qkv.weight"
    vit, swin = under("backbone.", _VIT), under("backbone.", _SWIN)
    whole = Dialect(
        name="mmpretrain", family="vit", library=_MMPRETRAIN, keys=key_map(vit), marks=(f"backbone.{first}",),
        unmarked=("head.fc.weight",),
    )  # fmt: skip
    whole_swin = Dialect(
        name="mmpretrain", family="swin", library=_MMPRETRAIN, keys=key_map(swin, _MERGING),
        marks=(f"backbone.{first_of_stage}",), derived={f"backbone.{_INDEX}": indices}, pad="mmpretrain",
    )  # fmt: skip
    return (
        whole,
        whole_swin,
        replace(
            whole, name="mmpretrain-linear", keys=key_map({**vit, "head.{p}": "head.fc.{p}"}),
            marks=(f"backbone.{first}", "head.fc.weight"), unmarked=(),
        ),
        replace(whole, name="mmpretrain-bare", keys=key_map(headless(_VIT)), marks=(first,), unmarked=()),
        replace(
            whole_swin, name="mmpretrain-bare", keys=key_map(headless(_SWIN), _MERGING), marks=(first_of_stage,),
            derived={_INDEX: indices},
        ),
    )  # fmt: skip


DIALECTS = _dialects()
