"""`from_timm`: convert a timm model to a backbone of this library with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import timm
import torch
from timm.layers import ClassifierHead, LayerScale, Mlp, PatchEmbed
from timm.models import swin_transformer, vision_transformer
from torch import Tensor, nn

from kernelbank.errors import InputError, SpecError
from kernelbank.model import Dropout, ModelSpec, SwinTrunk, ViTTrunk, by_stage
from kernelbank.nn.backbone import Backbone
from kernelbank.nn.build import build_backbone
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.nn.edit.stock import block_attentions, has_adapter
from kernelbank.nn.linears import TensorHolder
from kernelbank.nn.mixer import Mixer
from kernelbank.text import suggest
from kernelbank.weights.infer import LAYER_SCALE
from kernelbank.weights.keymap import fit
from kernelbank.weights.ours import KEYS
from kernelbank.weights.stock import ACTIVATIONS, activation_name, mlp_text

NORMS = ("norm", "norm1", "norm2", "norm_pre", "fc_norm", "q_norm", "k_norm")
"""The names of timm's norms."""


def from_timm(model: nn.Module | str, mixer: str | None = None, **kwargs: Any) -> Backbone:
    """Return a backbone of this library with the weights of `model`, a timm VisionTransformer or SwinTransformer or its
    name.

    The specs are those of the model: `vit` or `swin` with its windows (with ``pad=timm`` if they do not fill the grid),
    or those of its replaced mixers, and its FFN. `mixer` then replaces cells or specs as `replace_mixers` does, and
    ``replaced`` of the backbone is a table with the outcome for each tensor. For a name, `kwargs` are passed to
    ``timm.create_model``: ``from_timm("deit_small_patch16_224", pretrained=True)``.

    The backbone computes the same as the model. It has the same device, dtype and mode, and shares no tensor with it.

    Raises:
        InputError: If timm does not know the name, or the model has a class, norm, MLP, block or attention pooling that
            the trunks of this library do not have. The message names the first such part.
        SpecError: If `mixer` does not fit.
    """
    if isinstance(model, str):
        model = create(model, **kwargs)
    elif kwargs:
        raise InputError(f"invalid {next(iter(kwargs))}: the model is built already; expected a name of timm with it")
    spec = read_model(model)
    backbone = with_state(spec, _to_ours(spec, model, model.state_dict()))
    _freeze(backbone, model, spec)
    for name in ("pretrained_cfg", "default_cfg"):  # what timm.data reads
        if hasattr(model, name):
            setattr(backbone, name, getattr(model, name))
    backbone.train(model.training)
    return backbone if mixer is None else cast(Backbone, replace_mixers(backbone, mixer))


def create(name: str, *, meta: bool = False, **kwargs: Any) -> nn.Module:
    """timm's model of this name, on the meta device if asked. Raises InputError if timm does not know the name, its
    weights cannot be fetched, or the model refuses an argument."""
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(f"unknown model {name!r}{suggest(name.partition('.')[0], known)}; expected a file, or a name "
                         "of timm.list_models()")  # fmt: skip
    try:
        with torch.device("meta") if meta else nullcontext():
            return timm.create_model(name, **kwargs)
    except (TypeError, AssertionError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, (SpecError, InputError)):
            raise
        raise InputError(f"model {name}: {' '.join(str(error).split()) or type(error).__name__}") from None


def with_state(spec: ModelSpec, state: Mapping[str, Tensor], source: str = "our backbone") -> Backbone:
    """Our backbone of `spec` with `state` under our names, in eval mode. Raises InputError naming `source` and the
    tensors that are missing, left over or of another shape or type."""
    backbone = build_backbone(spec, weight_init="skip", device="meta")
    fit(state, backbone.state_dict(), source)
    backbone.load_state_dict({key: tensor.detach().clone() for key, tensor in state.items()}, assign=True)
    device = next(iter(state.values())).device
    for module in backbone.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return backbone.to(device).eval()


def our_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the backbone by name."""
    backbone = build_backbone(spec, weight_init="skip", device="meta")
    return {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}


def _to_ours(spec: ModelSpec, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of `model` under our names, which the tensors of replaced mixers already have."""
    mixers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Mixer))
    renamed = {key: tensor for key, tensor in with_biases(state).items() if not key.startswith(mixers)}
    ours = {key: tensor for key, tensor in state.items() if key.startswith(mixers)}
    return KEYS[spec.trunk.family].back(renamed, our_shapes(spec)) | ours


# ---- reading a model -------------------------------------------------------------------------------------


def read_model(model: nn.Module) -> ModelSpec:
    """Return the description of a timm model. Raises InputError naming a part that our trunks do not have."""
    if type(model) is vision_transformer.VisionTransformer:
        return _read_vit(model)
    if type(model) is swin_transformer.SwinTransformer:
        return _read_swin(model)
    other = "; replace_mixers changes it as it is" if has_adapter(model) else ""
    raise InputError(f"invalid model: a {type(model).__name__}; expected timm's VisionTransformer or SwinTransformer"
                     f"{other}")  # fmt: skip


def _read_vit(model: Any) -> ModelSpec:
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        _exactly(block, vision_transformer.Block, f"blocks.{index}", "block_fn")
        for name in ("ls1", "ls2"):
            _exactly(getattr(block, name), (LayerScale, nn.Identity), f"blocks.{index}.{name}", "init_values")
    if not blocks:
        raise InputError("invalid depth=0; expected at least one block")
    _exactly(model.patch_embed, PatchEmbed, "patch_embed", "embed_layer")
    _exactly(model.patch_embed.norm, nn.Identity, "patch_embed.norm", "embed_norm_layer")
    if model.attn_pool is not None:
        raise InputError(f"attn_pool: invalid global_pool={model.global_pool!r}; expected token, avg, avgmax or max")
    first, attentions = blocks[0], list(block_attentions(model))
    activation, mlp_bias = _read_mlps(blocks)
    proj_bias = mlp_bias if isinstance(first.attn, Mixer) else first.attn.proj.bias is not None
    if proj_bias != mlp_bias:
        raise InputError(f"blocks.0.mlp: invalid bias={mlp_bias} beside proj_bias={proj_bias}; expected the same")
    width = model.embed_dim
    trunk = ViTTrunk(
        patch_size=tuple(model.patch_embed.patch_size), embed_dim=width, depth=len(blocks),
        num_heads=attentions[0].mixer.num_heads, class_token=model.has_class_token, reg_tokens=model.num_reg_tokens,
        pos_embed="none" if model.pos_embed is None else "learn", no_embed_class=model.no_embed_class,
        global_pool=model.global_pool, pool_include_prefix=model.pool_include_prefix,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
        init_values=LAYER_SCALE if isinstance(first.ls1, LayerScale) else None,
        dynamic_img_size=bool(model.dynamic_img_size), dynamic_img_pad=bool(model.patch_embed.dynamic_img_pad),
        norm_eps=_read_norms(model),
    )  # fmt: skip
    return ModelSpec(
        trunk=trunk, mixer=str(attentions[0].spec),
        mlp=mlp_text(width, first.mlp.fc1.out_features, activation, mlp_bias),
        img_size=tuple(model.patch_embed.img_size), in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        dropout=_read_dropout(first, blocks[-1], model.head_drop.p, model.pos_drop.p),
    )  # fmt: skip


def _read_swin(model: Any) -> ModelSpec:
    stages = [list(stage.blocks) for stage in model.layers]
    if not all(stages):
        raise InputError("layers: invalid depth=0 of a stage; expected at least one block")
    _exactly(model.patch_embed, PatchEmbed, "patch_embed", "embed_layer")
    _exactly(model.head, ClassifierHead, "head", "head")
    attentions = list(block_attentions(model))
    specs = {attention.stage: attention.spec for attention in reversed(attentions)}
    heads = {attention.stage: attention.mixer.num_heads for attention in attentions}
    width = model.patch_embed.proj.out_channels
    activation, mlp_bias = _read_mlps([block for blocks in stages for block in blocks])
    if (activation, mlp_bias) != ("gelu", True):
        raise InputError(f"layers.0.blocks.0.mlp: invalid activation {activation} with bias={mlp_bias}; expected gelu "
                         "with bias")  # fmt: skip
    trunk = SwinTrunk(
        patch_size=tuple(model.patch_embed.patch_size), embed_dim=width, depths=tuple(map(len, stages)),
        num_heads=tuple(heads[stage] for stage in sorted(heads)), global_pool=model.global_pool,
        dynamic_img_size=bool(model.dynamic_img_size), norm_eps=_read_norms(model),
    )  # fmt: skip
    mlps = [mlp_text(width * 2**i, blocks[0].mlp.fc1.out_features, activation, mlp_bias)
            for i, blocks in enumerate(stages)]  # fmt: skip
    return ModelSpec(
        trunk=trunk, mixer=by_stage([str(specs[stage]) for stage in sorted(specs)]), mlp=by_stage(mlps),
        img_size=tuple(model.patch_embed.img_size), in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        dropout=_read_dropout(stages[0][0], stages[-1][-1], model.head.drop.p, 0.0),
    )  # fmt: skip


def _read_dropout(first: Any, last: Any, head: float, positions: float) -> Dropout:
    """Return the dropout rates of a timm model, from the attention of its first block and the drop path of its last."""
    attention = first.attn
    rate = attention.attn_drop.p if isinstance(attention.attn_drop, nn.Dropout) else attention.attn_drop
    proj = attention.proj_drop.p if isinstance(attention.proj_drop, nn.Dropout) else attention.proj_drop
    return Dropout(
        drop_rate=float(head), pos_drop_rate=float(positions), proj_drop_rate=float(proj), attn_drop_rate=float(rate),
        drop_path_rate=float(getattr(last.drop_path1, "drop_prob", 0.0) or 0.0),
    )  # fmt: skip


def _read_mlps(blocks: list[Any]) -> tuple[str, bool]:
    """Return the activation and bias of the MLPs. Raises InputError if no `ffn` spec has them, or if blocks differ."""
    kinds = set()
    for index, block in enumerate(blocks):
        mlp, where = block.mlp, f"mlp of block {index}"
        _exactly(mlp, Mlp, where, "mlp_layer")
        _exactly(mlp.fc1, nn.Linear, where, "use_conv")
        _exactly(mlp.norm, nn.Identity, where, "scale_mlp_norm")
        name = activation_name(mlp.act)
        if name is None:
            raise InputError(f"{where}: invalid act_layer={mlp.act}; expected {', '.join(ACTIVATIONS)}")
        if (mlp.fc1.bias is None) != (mlp.fc2.bias is None):
            raise InputError(f"{where}: invalid bias in one layer alone; expected both or none")
        kinds.add((name, mlp.fc1.bias is not None))
    if len(kinds) != 1:
        raise InputError("mlp: invalid activations or biases that differ between blocks; expected the same in all")
    return kinds.pop()


def _read_norms(model: nn.Module) -> float:
    """Return the epsilon of the norms. Raises InputError for norms other than LayerNorm, or several epsilons."""
    eps: dict[float, str] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf not in NORMS or isinstance(module, (nn.Identity, TensorHolder)):
            continue
        if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
            raise InputError(f"{name}: invalid norm_layer={type(module).__name__}; expected an affine LayerNorm")
        if leaf not in ("q_norm", "k_norm"):
            eps.setdefault(module.eps, name)
    if len(eps) != 1:
        listed = ", ".join(f"{value:g} in {name}" for value, name in eps.items())
        raise InputError(f"norm_layer: invalid eps {listed}; expected one for all")
    return next(iter(eps))


def _exactly(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], where: str, field: str) -> None:
    """Raise InputError, naming `field`, for another class or a subclass, which may compute something else."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(module) not in kinds:
        raise InputError(f"{where}: invalid {field}={type(module).__name__}; expected "
                         f"{' or '.join(k.__name__ for k in kinds)}")  # fmt: skip


def _freeze(backbone: Backbone, model: nn.Module, spec: ModelSpec) -> None:
    """Freeze the parameters that come from frozen parameters of `model`."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return
    marks = {key: torch.full(tensor.shape, key in frozen) for key, tensor in model.state_dict().items()}
    marks = _to_ours(spec, model, marks)
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(not marks[key].any())


def with_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which every projection has a bias, zero if it had none, since our output projection has one."""
    whole = dict(state)
    for key, tensor in state.items():
        if key.endswith("attn.proj.weight"):
            whole.setdefault(f"{key.removesuffix('weight')}bias", tensor.new_zeros(tensor.shape[0]))
    return whole
