"""Hugging Face transformers 4.57 and 5.23, models/{vit,swin}/modeling_*.py: the keys of both versions."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, SwinTrunk, ViTTrunk
from kernelbank.weights.buffers import indices
from kernelbank.weights.dialects.dialect import Dialect, Library, need
from kernelbank.weights.keymap import Names, State, key_map, listed
from kernelbank.weights.pivot import BLOCK, STAGE_BLOCK, headless, under
from kernelbank.weights.stock import mlp_activation, mlp_width, one_of_all, stock_arguments

# ---- names -----------------------------------------------------------------------------------------------

_SWIN_BLOCK = "encoder.layers.{i}.blocks.{j}"
_TABLE = f"{STAGE_BLOCK}.attn.relative_position_bias_table"
_POOLER = {"pooler.dense.{p}": "transformers' pooler after the class token: timm's models have none"}
_VIT_TRUNK: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "norm.{p}": "layernorm.{p}",
    "head.{p}": "classifier.{p}",
}
_SWIN_TRUNK: Names = {
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "patch_embed.norm.{p}": "embeddings.norm.{p}",
    "layers.{i+1}.downsample.norm.{p}": "encoder.layers.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "encoder.layers.{i}.downsample.reduction.weight",
    "norm.{p}": "layernorm.{p}",
    "head.fc.{p}": "classifier.{p}",
}


def _block(block: str, theirs: str, qkv: tuple[str, str, str], proj: str, fc1: str, fc2: str) -> Names:
    return {
        f"{block}.norm1.{{p}}": f"{theirs}.layernorm_before.{{p}}",
        f"{block}.attn.qkv.{{p}}": tuple(f"{theirs}.attention.{name}.{{p}}" for name in qkv),
        f"{block}.attn.proj.{{p}}": f"{theirs}.attention.{proj}.{{p}}",
        f"{block}.norm2.{{p}}": f"{theirs}.layernorm_after.{{p}}",
        f"{block}.mlp.fc1.{{p}}": f"{theirs}.{fc1}.{{p}}",
        f"{block}.mlp.fc2.{{p}}": f"{theirs}.{fc2}.{{p}}",
    }


_NEW = (("q_proj", "k_proj", "v_proj"), "o_proj", "mlp.fc1", "mlp.fc2")
_OLD_REST = ("output.dense", "intermediate.dense", "output.dense")
_OLD_VIT = (("attention.query", "attention.key", "attention.value"), *_OLD_REST)
_OLD_SWIN = (("self.query", "self.key", "self.value"), *_OLD_REST)
_VIT_5: Names = _VIT_TRUNK | _block(BLOCK, "layers.{i}", *_NEW)
_VIT_4: Names = _VIT_TRUNK | _block(BLOCK, "encoder.layer.{i}", *_OLD_VIT)
_SWIN_5: Names = _SWIN_TRUNK | _block(STAGE_BLOCK, _SWIN_BLOCK, *_NEW) | {
    _TABLE: f"{_SWIN_BLOCK}.attention.relative_position_bias.relative_position_bias_table"
}  # fmt: skip
_SWIN_4: Names = _SWIN_TRUNK | _block(STAGE_BLOCK, _SWIN_BLOCK, *_OLD_SWIN) | {
    _TABLE: f"{_SWIN_BLOCK}.attention.self.relative_position_bias_table"
}  # fmt: skip

# ---- models ----------------------------------------------------------------------------------------------


MASK = {"embeddings.mask_token": "the token of masked patches, which images without a mask do not use"}
HIDDEN_ACT = {
    "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
}  # fmt: skip
"""transformers' names of the activations, by timm's."""


def _build(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    """Build the model. transformers 5 reads the keys of both versions, transformers 4 only its own."""
    need("transformers")
    transformers = import_module("transformers")
    version = transformers.__version__
    if dialect.owner == "huggingface" and int(version.partition(".")[0]) < 5:
        raise ImportError(f"transformers {version} has other keys")
    trunk, arguments, first = spec.trunk, stock_arguments(spec), spec.stages[0]
    assert isinstance(trunk, (ViTTrunk, SwinTrunk))
    shared = {
        "num_labels": spec.num_classes, "num_channels": spec.in_chans, "hidden_act": HIDDEN_ACT[mlp_activation(first)],
        "layer_norm_eps": trunk.norm_eps, "qkv_bias": first.mixer.bias,
    }  # fmt: skip
    if isinstance(trunk, ViTTrunk):
        config: Any = transformers.ViTConfig(
            hidden_size=trunk.embed_dim, num_hidden_layers=trunk.depth, num_attention_heads=trunk.num_heads,
            image_size=spec.image, intermediate_size=mlp_width(first), patch_size=trunk.patch_size, **shared,
        )  # fmt: skip
        if dialect.bare:
            return cast(nn.Module, transformers.ViTModel(config, add_pooling_layer=False))
        return cast(nn.Module, transformers.ViTForImageClassification(config))
    config = transformers.SwinConfig(
        image_size=spec.image[0], patch_size=trunk.patch_size[0], embed_dim=trunk.embed_dim,
        depths=list(trunk.depths), num_heads=list(trunk.num_heads), mlp_ratio=arguments["mlp_ratio"],
        window_size=one_of_all(arguments["window_size"], "window_size")[0], **shared,
    )  # fmt: skip
    kind = transformers.SwinModel if dialect.bare else transformers.SwinForImageClassification
    return cast(nn.Module, kind(config))


def load(model: Any, state: State) -> nn.Module:
    """Load a state dict with transformers' own loader, which renames the keys of its earlier versions."""
    pooling = {"add_pooling_layer": False} if type(model).__name__ == "ViTModel" else {}
    loaded, report = type(model).from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True, **pooling
    )
    missing = [key for key in report["missing_keys"] if key not in MASK]
    if wrong := [*missing, *report["unexpected_keys"], *map(str, report["mismatched_keys"])]:
        raise InputError(f"the library refuses the tensors: {listed(wrong)}")
    return cast(nn.Module, loaded)


def call(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, else the pooled tokens, else the class token."""
    output = model(images)
    if "logits" in output:
        return cast(Tensor, output.logits)
    pooled = output.get("pooler_output")
    return cast(Tensor, output.last_hidden_state[:, 0] if pooled is None else pooled)


# ---- dialects --------------------------------------------------------------------------------------------


def _dialects(
    name: str, install: str, vit: Names, swin: Names, marks: tuple[str, str], index: str = ""
) -> tuple[Dialect, ...]:
    """Return the dialects of both families, as classifiers and without a head. `marks` are a norm of the first block
    of ViT and a query of Swin's, `index` the pattern of Swin's index if it is in the state dict."""
    library = Library(install=install, build=_build, call=call, load=load)
    bare = (
        Dialect(
            name=f"{name}-bare", family="vit", library=library, keys=key_map(headless(vit), dropped=_POOLER),
            marks=(marks[0],),
        ),
        Dialect(
            name=f"{name}-bare", family="swin", library=library, keys=key_map(headless(swin)), marks=(marks[1],),
            derived={index: indices} if index else {}, pad="mmpretrain",
        ),
    )  # fmt: skip
    whole = (
        replace(bare[0], name=name, keys=key_map(under("vit.", vit)), marks=(f"vit.{marks[0]}",)),
        replace(
            bare[1], name=name, keys=key_map(under("swin.", swin)), marks=(f"swin.{marks[1]}",),
            derived={f"swin.{index}": indices} if index else {},
        ),
    )  # fmt: skip
    return (*whole, *bare)


DIALECTS = (
    *_dialects(
        "huggingface", "install 'transformers>=5'", _VIT_5, _SWIN_5,
        ("layers.0.layernorm_before.weight", "encoder.layers.0.blocks.0.attention.q_proj.weight"),
    ),
    *_dialects(
        "huggingface4", "install transformers", _VIT_4, _SWIN_4,
        ("encoder.layer.0.layernorm_before.weight",
         "encoder.layers.0.blocks.0.attention.self.query.weight"),
        f"{_SWIN_BLOCK}.attention.self.relative_position_index",
    ),
)  # fmt: skip
