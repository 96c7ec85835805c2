"""from_timm: a timm model as our backbone with the same weights, its records read off the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import timm
import torch
from timm.layers import ClassifierHead, LayerScale, Mlp, PatchEmbed
from timm.models import swin_transformer, vision_transformer
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.backbone import Backbone, HierarchicalBackbone, PlainBackbone
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.nn.edit.stock import sites
from kernelbank.spec import SpecError, Window
from kernelbank.text import suggest
from kernelbank.weights.architecture import ACTIVATIONS, LAYER_SCALE, Architecture, Family
from kernelbank.weights.dialects import named
from kernelbank.weights.keymap import cover

CLASSES: Mapping[Family, type[Backbone]] = {"plain": PlainBackbone, "hierarchical": HierarchicalBackbone}


def from_timm(model: nn.Module | str, mixer: str | None = None, **kwargs: Any) -> Backbone:
    """Our backbone with the weights of `model`, a timm VisionTransformer or SwinTransformer or its name.

    The records are read off the model: `vit` or `swin` with its windows (with ``pad=timm`` where they do not fill the
    grid) and its FFN. `mixer` then replaces cells or records as `replace_mixers` does, and `replaced` of the backbone
    tells tensor by tensor what became of them. With a name, `kwargs` go to ``timm.create_model``:
    ``from_timm("deit_small_patch16_224", pretrained=True)``.

    The backbone computes what the model computes, is on its device, in its dtype and its mode, and shares no tensor
    with it. Raises InputError for a name that timm does not know, and naming the first thing that our skeletons do not
    have: another class, norm, MLP, block or pooling by attention; SpecError for a `mixer` that does not fit.
    """
    if isinstance(model, str):
        model = create(model, **kwargs)
    elif kwargs:
        raise InputError(f"{next(iter(kwargs))}: arguments are legal with a name only; this model is built already")
    architecture = read_model(model)
    backbone = backbone_of(architecture, _with_biases(model.state_dict()), drops=read_drops(model))
    _freeze(backbone, model, architecture)
    for name in ("pretrained_cfg", "default_cfg"):  # what timm.data reads
        if hasattr(model, name):
            setattr(backbone, name, getattr(model, name))
    backbone.train(model.training)
    return backbone if mixer is None else cast(Backbone, replace_mixers(backbone, mixer))


def create(name: str, *, meta: bool = False, **kwargs: Any) -> nn.Module:
    """timm's model of this name, on the meta device if asked. Raises InputError for a name that timm does not know,
    weights that cannot be fetched and arguments that the model refuses."""
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(f"unknown model {name!r}{suggest(name.partition('.')[0], known)}; legal: a file, or a name "
                         "that timm.list_models() gives")  # fmt: skip
    try:
        with torch.device("meta") if meta else nullcontext():
            return timm.create_model(name, **kwargs)
    except (TypeError, AssertionError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, (SpecError, InputError)):
            raise
        raise InputError(f"model {name}: {' '.join(str(error).split()) or type(error).__name__}") from None


def backbone_of(
    architecture: Architecture,
    state: Mapping[str, Tensor],
    records: tuple[str, str] | None = None,
    drops: Mapping[str, Any] | None = None,
) -> Backbone:
    """Our backbone of `architecture` with `state` under timm's keys, or under ours where `records` are given.

    Raises InputError listing tensors that are missing, left over or of another shape.
    """
    mixer, mlp = records or architecture.records()
    backbone = CLASSES[architecture.family](
        mixer, mlp, **architecture.trunk(), **(drops or {}), weight_init="skip", device="meta"
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    if records is None:
        state = named("kernelbank", architecture.family).keys.back(state, shapes)
    cover(state, shapes, "our backbone")
    backbone.load_state_dict({key: tensor.detach().clone() for key, tensor in state.items()}, assign=True)
    device = next(iter(state.values())).device
    for module in backbone.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return backbone.to(device).eval()


# ---- reading a model -------------------------------------------------------------------------------------


def read_model(model: nn.Module) -> Architecture:
    """The architecture of a timm model. Raises InputError naming what our skeletons do not have."""
    if type(model) is vision_transformer.VisionTransformer:
        return _read_plain(model)
    if type(model) is swin_transformer.SwinTransformer:
        return _read_stages(model)
    raise InputError(
        f"model: a {type(model).__name__} is not legal; legal: timm's VisionTransformer or SwinTransformer"
    )


def _read_plain(model: Any) -> Architecture:
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        _exactly(block, vision_transformer.Block, f"blocks.{index}", "block_fn")
        for name in ("ls1", "ls2"):
            _exactly(getattr(block, name), (LayerScale, nn.Identity), f"blocks.{index}.{name}", "init_values")
    if not blocks:
        raise InputError("depth=0 is not legal; legal: a block or more")
    _exactly(model.patch_embed, PatchEmbed, "patch_embed", "embed_layer")
    _exactly(model.patch_embed.norm, nn.Identity, "patch_embed.norm", "embed_norm_layer")
    if model.attn_pool is not None:
        raise InputError(f"attn_pool: global_pool={model.global_pool!r} is not legal; legal: token, avg, avgmax, max")
    first, mixers = blocks[0], [site.mixer for site in sites(model)]
    _, act, mlp_bias = _read_mlps(blocks)
    proj_bias = first.attn.proj.bias is not None
    if proj_bias != mlp_bias:
        raise InputError(f"blocks.0.mlp: bias={mlp_bias} is not legal beside proj_bias={proj_bias}; legal: the same")
    return Architecture(
        family="plain",
        norm_eps=_read_norms(model),
        pad="timm",
        arguments={
            **_read_patches(model), "num_classes": model.num_classes, "global_pool": model.global_pool,
            "embed_dim": model.embed_dim, "depth": len(blocks), "num_heads": mixers[0].num_heads,
            "mlp_ratio": first.mlp.fc1.out_features / model.embed_dim, "qkv_bias": mixers[0].spec.bias,
            "qk_norm": mixers[0].qk_norm, "proj_bias": proj_bias,
            "init_values": LAYER_SCALE if isinstance(first.ls1, LayerScale) else None,
            "class_token": model.has_class_token, "pos_embed": "none" if model.pos_embed is None else "learn",
            "no_embed_class": model.no_embed_class, "reg_tokens": model.num_reg_tokens,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
            "fc_norm": not isinstance(model.fc_norm, nn.Identity), "pool_include_prefix": model.pool_include_prefix,
            "act_layer": act,
        },
    )  # fmt: skip


def _read_stages(model: Any) -> Architecture:
    stages = [list(stage.blocks) for stage in model.layers]
    for i, blocks in enumerate(stages):
        for j, block in enumerate(blocks):
            _exactly(block, swin_transformer.SwinTransformerBlock, f"layers.{i}.blocks.{j}", "block")
    _exactly(model.patch_embed, PatchEmbed, "patch_embed", "embed_layer")
    _exactly(model.head, ClassifierHead, "head", "head")
    found = list(sites(model))
    records = {site.stage: site.spec for site in found}
    heads = {site.stage: site.mixer.num_heads for site in found}
    windows = [spec.support.M for spec in records.values() if isinstance(spec.support, Window)]
    biased = {spec.bias for spec in records.values()}
    if len(windows) != len(stages) or len(biased) != 1:
        raise InputError("layers: stages without blocks, or with and without qkv_bias, are not legal")
    ratios = [
        blocks[0].mlp.fc1.out_features / (model.patch_embed.proj.out_channels * 2**i) for i, blocks in enumerate(stages)
    ]
    _, act, mlp_bias = _read_mlps([block for blocks in stages for block in blocks])
    if (act, mlp_bias) != ("gelu", True):
        raise InputError(f"layers.0.blocks.0.mlp: {act} with bias={mlp_bias} is not legal; legal: gelu with bias")
    return Architecture(
        family="hierarchical",
        norm_eps=_read_norms(model),
        pad="timm",
        arguments={
            **_read_patches(model), "num_classes": model.num_classes, "global_pool": model.global_pool,
            "embed_dim": model.patch_embed.proj.out_channels, "depths": [len(blocks) for blocks in stages],
            "num_heads": [heads[stage] for stage in sorted(heads)], "window_size": windows,
            "mlp_ratio": ratios[0] if len(set(ratios)) == 1 else ratios, "qkv_bias": biased.pop(),
        },
    )  # fmt: skip


def _read_patches(model: Any) -> dict[str, Any]:
    embed = model.patch_embed
    return {
        "img_size": tuple(embed.img_size), "patch_size": tuple(embed.patch_size), "in_chans": embed.proj.in_channels,
    }  # fmt: skip


def _read_mlps(blocks: list[Any]) -> tuple[int, str, bool]:
    """Hidden width, activation and bias of the first MLP. Raises InputError for one that no `ffn` record holds."""
    found = []
    for index, block in enumerate(blocks):
        mlp, where = block.mlp, f"mlp of block {index}"
        _exactly(mlp, Mlp, where, "mlp_layer")
        _exactly(mlp.fc1, nn.Linear, where, "use_conv")
        _exactly(mlp.norm, nn.Identity, where, "scale_mlp_norm")
        act = next((name for name, kind in ACTIVATIONS.items() if type(mlp.act) is kind), None)
        if act is None or getattr(mlp.act, "approximate", "none") != "none":
            raise InputError(f"{where}: act_layer={mlp.act} is not legal; legal: {', '.join(ACTIVATIONS)}")
        if (mlp.fc1.bias is None) != (mlp.fc2.bias is None):
            raise InputError(f"{where}: a bias in one layer is not legal; legal: in both or none")
        found.append((act, mlp.fc1.bias is not None))
    if len(set(found)) != 1:
        raise InputError("mlp: blocks with different activations or biases are not legal")
    return blocks[0].mlp.fc1.out_features, *found[0]


def _read_norms(model: nn.Module) -> float:
    """The eps of every norm. Raises InputError for another norm than LayerNorm, or for several eps."""
    eps: dict[float, str] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf not in NORMS or isinstance(module, nn.Identity):
            continue
        if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
            raise InputError(
                f"{name}: norm_layer={type(module).__name__} is not legal; legal: LayerNorm with an affine"
            )
        if leaf not in ("q_norm", "k_norm"):
            eps.setdefault(module.eps, name)
    if len(eps) != 1:
        found = ", ".join(f"{value:g} in {name}" for value, name in eps.items())
        raise InputError(f"norm_layer: eps {found} is not legal; legal: one for all")
    return next(iter(eps))


NORMS = ("norm", "norm1", "norm2", "norm_pre", "fc_norm", "q_norm", "k_norm")
"""Under which names timm keeps its norms."""


def _exactly(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], where: str, field: str) -> None:
    """Raises InputError, naming `field`, for another class; subclasses compute something else."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(module) not in kinds:
        legal = " or ".join(k.__name__ for k in kinds)
        raise InputError(f"{where}: {field}={type(module).__name__} is not legal; legal: {legal}")


def read_drops(model: Any) -> dict[str, Any]:
    """The dropout rates of a timm model, and whether it takes other image sizes, as arguments."""
    blocks = [block for stage in getattr(model, "layers", [model]) for block in stage.blocks]
    last = blocks[-1]
    plain = isinstance(model, vision_transformer.VisionTransformer)
    shared = {
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0) or 0.0, "attn_drop_rate": last.attn.attn_drop.p,
        "proj_drop_rate": last.attn.proj_drop.p, "drop_rate": (model.head_drop if plain else model.head.drop).p,
        "dynamic_img_size": model.dynamic_img_size,
    }  # fmt: skip
    if not plain:
        return shared
    return shared | {
        "pos_drop_rate": model.pos_drop.p, "dynamic_img_pad": model.patch_embed.dynamic_img_pad,
    }  # fmt: skip


def _freeze(backbone: Backbone, model: nn.Module, architecture: Architecture) -> None:
    """Freeze what comes of frozen parameters of `model`."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return
    shapes = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    marks = {key: torch.full(tensor.shape, key in frozen) for key, tensor in _with_biases(model.state_dict()).items()}
    for key, mark in named("kernelbank", architecture.family).keys.back(marks, shapes).items():
        backbone.get_parameter(key).requires_grad_(not mark.any())


def _with_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which every projection has a bias, zero where it had none: our output projection always has one."""
    whole = dict(state)
    for key, tensor in state.items():
        if key.endswith("attn.proj.weight"):
            whole.setdefault(f"{key.removesuffix('weight')}bias", tensor.new_zeros(tensor.shape[0]))
    return whole
