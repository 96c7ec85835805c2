"""Hugging Face transformers 5.24, models/{dinov2,dinov2_with_registers,clip,siglip}/modeling_*.py: vision towers with
timm's trunk of a ViT. The keys are those of the files, which transformers 4 and 5 write alike apart from the prefix
``vision_model.`` of CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, ViTTrunk
from kernelbank.weights.changes import LEADING, PROJECTION, REGISTERS, TOKEN
from kernelbank.weights.dialects.dialect import Dialect, Library, need
from kernelbank.weights.dialects.huggingface import HIDDEN_ACT, MASK, load
from kernelbank.weights.keymap import Changes, KeyMap, Names, key_map, rule
from kernelbank.weights.pivot import BLOCK, under
from kernelbank.weights.stock import mlp_activation, mlp_width

# ---- names -----------------------------------------------------------------------------------------------

_LAYER = "encoder.layer.{i}"
_DINOV2: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    f"{BLOCK}.norm1.{{p}}": f"{_LAYER}.norm1.{{p}}",
    f"{BLOCK}.attn.qkv.{{p}}": tuple(f"{_LAYER}.attention.attention.{x}.{{p}}" for x in ("query", "key", "value")),
    f"{BLOCK}.attn.proj.{{p}}": f"{_LAYER}.attention.output.dense.{{p}}",
    f"{BLOCK}.ls1.gamma": f"{_LAYER}.layer_scale1.lambda1",
    f"{BLOCK}.norm2.{{p}}": f"{_LAYER}.norm2.{{p}}",
    f"{BLOCK}.mlp.fc1.{{p}}": f"{_LAYER}.mlp.fc1.{{p}}",
    f"{BLOCK}.mlp.fc2.{{p}}": f"{_LAYER}.mlp.fc2.{{p}}",
    f"{BLOCK}.ls2.gamma": f"{_LAYER}.layer_scale2.lambda1",
    "norm.{p}": "layernorm.{p}",
}
_PLACES = ("embeddings.register_tokens", "embeddings.position_embeddings")
_TOWER: Names = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj.{p}": "embeddings.patch_embedding.{p}",
    f"{BLOCK}.norm1.{{p}}": "encoder.layers.{i}.layer_norm1.{p}",
    f"{BLOCK}.attn.qkv.{{p}}": tuple(f"encoder.layers.{{i}}.self_attn.{x}_proj.{{p}}" for x in "qkv"),
    f"{BLOCK}.attn.proj.{{p}}": "encoder.layers.{i}.self_attn.out_proj.{p}",
    f"{BLOCK}.norm2.{{p}}": "encoder.layers.{i}.layer_norm2.{p}",
    f"{BLOCK}.mlp.fc1.{{p}}": "encoder.layers.{i}.mlp.fc1.{p}",
    f"{BLOCK}.mlp.fc2.{{p}}": "encoder.layers.{i}.mlp.fc2.{p}",
    "norm.{p}": "post_layernorm.{p}",
}
_CLIP: Names = _TOWER | {"cls_token": "embeddings.class_embedding", "norm_pre.{p}": "pre_layrnorm.{p}"}
_CHANGES: Changes = {"pos_embed": LEADING, "cls_token": TOKEN}
_POOLING = "attention pooling, which the trunk has no place for: the outputs are the tokens after the last norm"
_POOLER = {f"head.{name}": _POOLING for name in (
    "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.{p}", "layernorm.{p}",
    "mlp.fc1.{p}", "mlp.fc2.{p}")}  # fmt: skip
_BUFFER = {"embeddings.position_ids": "the numbers of the positions, which transformers 4 saved"}

# ---- models ----------------------------------------------------------------------------------------------


def _arguments(spec: ModelSpec) -> dict[str, Any]:
    trunk, first = cast(ViTTrunk, spec.trunk), spec.stages[0]
    return {
        "hidden_size": trunk.embed_dim, "num_hidden_layers": trunk.depth, "num_attention_heads": trunk.num_heads,
        "image_size": spec.image[0], "patch_size": trunk.patch_size[0], "num_channels": spec.in_chans,
        "hidden_act": HIDDEN_ACT[mlp_activation(first)], "layer_norm_eps": trunk.norm_eps,
    }  # fmt: skip


def _build_dinov2(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("transformers")
    transformers, trunk, first = import_module("transformers"), cast(ViTTrunk, spec.trunk), spec.stages[0]
    ratio, rest = divmod(mlp_width(first), trunk.embed_dim)
    if rest:
        raise InputError(f"invalid mlp={str(first.mlp)!r} for {dialect.name}; expected a multiple of the channels")
    arguments = _arguments(spec) | {"mlp_ratio": ratio, "qkv_bias": first.mixer.bias, "layerscale_value": 1.0}
    if trunk.reg_tokens:
        config = transformers.Dinov2WithRegistersConfig(**arguments, num_register_tokens=trunk.reg_tokens)
        return cast(nn.Module, transformers.Dinov2WithRegistersModel(config))
    return cast(nn.Module, transformers.Dinov2Model(transformers.Dinov2Config(**arguments)))


def _build_clip(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("transformers")
    transformers = import_module("transformers")
    arguments = _arguments(spec) | {"intermediate_size": mlp_width(spec.stages[0])}
    if spec.num_classes:
        config = transformers.CLIPVisionConfig(**arguments, projection_dim=spec.num_classes)
        return cast(nn.Module, transformers.CLIPVisionModelWithProjection(config))
    return cast(nn.Module, transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**arguments)))


def _build_siglip(spec: ModelSpec, dialect: Dialect) -> nn.Module:
    need("transformers")
    transformers = import_module("transformers")
    arguments = _arguments(spec) | {"intermediate_size": mlp_width(spec.stages[0]), "vision_use_head": False}
    return cast(nn.Module, transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**arguments)))


def call_pooled(model: nn.Module, images: Tensor) -> Tensor:
    """The embedding of CLIP with a projection, else the class token after the last norm."""
    output = model(images)
    embedding = output.get("image_embeds")
    return cast(Tensor, output.pooler_output if embedding is None else embedding)


def call_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """The tokens after the last norm."""
    return cast(Tensor, model(images).last_hidden_state)


# ---- dialects --------------------------------------------------------------------------------------------

_INSTALL = "install 'transformers>=5'"


def _dinov2() -> tuple[Dialect, ...]:
    plain = Dialect(
        name="huggingface-dinov2", family="vit", keys=key_map(_DINOV2, dropped=MASK),
        library=Library(install=_INSTALL, build=_build_dinov2, call=call_pooled, load=load),
        marks=(f"{_LAYER.format(i=0)}.layer_scale1.lambda1", _PLACES[1]), unmarked=(_PLACES[0],),
    )  # fmt: skip
    names = {timm: name for timm, name in _DINOV2.items() if timm != "pos_embed"}
    keys = key_map(names, dropped=MASK)
    registers = rule(_PLACES, ("reg_token", "pos_embed"), REGISTERS)
    return plain, replace(
        plain, name="huggingface-dinov2-registers", keys=replace(keys, rules=(registers, *keys.rules)),
        marks=(*plain.marks, _PLACES[0]), unmarked=(),
    )  # fmt: skip


def _clip(prefix: str) -> Dialect:
    names = under(f"{prefix}.", _CLIP) if prefix else _CLIP
    keys: KeyMap = key_map(names, _CHANGES, {f"{prefix}.{key}".lstrip("."): why for key, why in _BUFFER.items()})
    if prefix:
        projection = rule("visual_projection.weight", ("head.weight", "head.bias"), PROJECTION)
        keys = replace(keys, rules=(*keys.rules, projection))
    return Dialect(
        name="huggingface-clip" if prefix else "huggingface-clip-bare", family="vit", keys=keys,
        library=Library(install=_INSTALL, build=_build_clip, call=call_pooled, load=load),
        marks=(f"{prefix}.pre_layrnorm.weight".lstrip("."),),
    )  # fmt: skip


DIALECTS = (
    *_dinov2(), _clip("vision_model"), _clip(""),
    Dialect(
        name="huggingface-siglip", family="vit", keys=key_map(_TOWER, _CHANGES, _POOLER | _BUFFER),
        library=Library(install=_INSTALL, build=_build_siglip, call=call_tokens, load=load),
        marks=("encoder.layers.0.self_attn.q_proj.weight", "embeddings.patch_embedding.bias"),
        unmarked=("pre_layrnorm.weight",), trunk={"global_pool": ""},
    ),
)  # fmt: skip
