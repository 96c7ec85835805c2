"""Build timm's VisionTransformer and SwinTransformer from the description of a model. Conversions are compared with
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

from timm.layers import LayerNorm
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kernelbank.errors import InputError
from kernelbank.model import Grid, ModelSpec, Stage, SwinTrunk, TimmTrunk, ViTTrunk, by_stage
from kernelbank.spec import Channels, MixerSpec, Static, Window

VIT, VIT_QK_NORM = MixerSpec.parse("vit"), MixerSpec.parse("vit_qk_norm")
SWIN, FFN = MixerSpec.parse("swin"), MixerSpec.parse("ffn")
Padding = Literal["masked", "mmpretrain", "timm"]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""Activations of an MLP that timm and a spec both have, by their name in both."""
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}
_CLASSES: dict[type[nn.Module], str] = {
    GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.ReLU: "relu", nn.SiLU: "silu",
}  # fmt: skip


def activation_name(module: nn.Module) -> str | None:
    """timm's name of an activation, None for one that is not in `ACTIVATIONS`."""
    if type(module) is nn.GELU:
        return _APPROXIMATE[module.approximate]
    return _CLASSES.get(type(module))


def build_stock(spec: ModelSpec, **options: Any) -> Any:
    """timm's model of `spec` in eval mode; `options` are further arguments of its class. Raises InputError as
    `stock_arguments`."""
    kind = VisionTransformer if isinstance(spec.trunk, ViTTrunk) else SwinTransformer
    return kind(**stock_arguments(spec), weight_init="skip", **options).eval()


def stock_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return `spec` as arguments of timm's VisionTransformer or SwinTransformer.

    Raises:
        InputError: If a mixer is not softmax attention (with Swin's windows in a Swin), an MLP is not fc1, activation,
            fc2, or the trunk is already a stock model.
    """
    trunk = spec.trunk
    if isinstance(trunk, TimmTrunk):
        raise InputError(f"invalid trunk={trunk.name}; expected a {ViTTrunk.family} or {SwinTrunk.family} trunk")
    stages = spec.stages
    ratios = [mlp_width(stage) / stage.dim for stage in stages]
    arguments = {
        "img_size": spec.image, "patch_size": trunk.patch_size, "in_chans": spec.in_chans,
        "num_classes": spec.num_classes, "global_pool": trunk.global_pool, "embed_dim": trunk.embed_dim,
        "mlp_ratio": one_of_all(ratios, "mlp_ratio") if isinstance(trunk, ViTTrunk) else unless_equal(ratios),
        "qkv_bias": one_of_all([stage.mixer.bias for stage in stages], "bias"),
        "norm_layer": partial(LayerNorm, eps=trunk.norm_eps), "dynamic_img_size": trunk.dynamic_img_size,
    }  # fmt: skip
    activation = one_of_all([mlp_activation(stage) for stage in stages], "activation")
    mlp_bias = one_of_all([cast(MixerSpec, stage.mlp).bias for stage in stages], "bias")
    if isinstance(trunk, SwinTrunk):
        if (activation, mlp_bias) != ("gelu", True):
            raise InputError(f"invalid mlp={spec.mlp!r} for timm's SwinTransformer; expected gelu, with bias")
        sides = [window_side(stage) for stage in stages]
        return arguments | {
            "depths": trunk.depths, "num_heads": trunk.num_heads, "window_size": tuple((side, side) for side in sides),
        }  # fmt: skip
    for stage in stages:
        if replace(stage.mixer, bias=True, resets=()) not in (VIT, VIT_QK_NORM):
            raise InputError(f"invalid mixer={str(stage.mixer)!r} for timm's VisionTransformer; expected 'vit'")
    same = (
        "depth", "num_heads", "class_token", "reg_tokens", "pos_embed", "no_embed_class", "pool_include_prefix",
        "pre_norm", "final_norm", "fc_norm", "init_values", "dynamic_img_pad",
    )  # fmt: skip
    return arguments | {name: getattr(trunk, name) for name in same} | {
        "act_layer": activation, "proj_bias": mlp_bias, "qk_norm": stages[0].mixer.kernel == VIT_QK_NORM.kernel,
    }  # fmt: skip


def is_stock(spec: ModelSpec) -> bool:
    """Whether timm's own classes can represent the model."""
    try:
        stock_arguments(spec)
    except InputError:
        return False
    return True


def window_side(stage: Stage) -> int:
    """Return M of a stage of Swin. Raises InputError for mixers other than Swin's window attention."""
    support = stage.mixer.support
    if isinstance(support, Window):
        plain = replace(stage.mixer, bias=True, support=replace(support, M=7, pad="masked"))
        if plain == SWIN:
            return support.M
    raise InputError(f"invalid mixer={str(stage.mixer)!r} for timm's SwinTransformer; expected 'swin', with any window")


def windows(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Return the window (a, b) of each stage in tokens, cut to the grid."""
    return tuple((min(window_side(stage), stage.grid[0]), min(window_side(stage), stage.grid[1]))
                 for stage in spec.stages)  # fmt: skip


def mlp_width(stage: Stage) -> int:
    """Return the hidden channels of the MLP. Raises InputError for MLPs other than fc1, activation, fc2."""
    mlp = stage.mlp
    if mlp is None or not isinstance(mlp.bank, Static):
        raise InputError(f"invalid mlp={'none' if mlp is None else str(mlp)!r} for timm; expected 'ffn'")
    if replace(mlp, bank=FFN.bank, activation=FFN.activation, bias=True) != FFN:
        raise InputError(f"invalid mlp={str(mlp)!r} for timm; expected 'ffn', with any bank, activation and bias")
    return mlp.bank.K.of(stage.dim) if isinstance(mlp.bank.K, Channels) else mlp.bank.K


def mlp_activation(stage: Stage) -> str:
    """Return timm's name of the activation of the MLP. Raises InputError if timm does not have it."""
    mlp_width(stage)
    steps = cast(MixerSpec, stage.mlp).activation
    name = "" if len(steps) != 1 or steps[0].argument is not None else steps[0].name
    if name not in ACTIVATIONS:
        raise InputError(f"invalid mlp={str(stage.mlp)!r} for timm; expected activation {', '.join(ACTIVATIONS)}")
    return name


def mlp_text(dim: int, width: int, activation: str, bias: bool) -> str:
    """Return the spec of an MLP with `width` hidden channels at `dim` channels."""
    kernels = f"{width // dim}C" if width % dim == 0 else str(width)
    return str(MixerSpec.parse(f"ffn bank=static({kernels}) activation={activation} bias={bias}"))


def with_padding(spec: ModelSpec, pad: Padding) -> ModelSpec:
    """`spec` with a library's padding of the windows that the grid does not fill, and none where it fills them."""
    texts = []
    for stage in spec.stages:
        support = stage.mixer.support
        if isinstance(support, Window):
            support = replace(support, pad="masked" if _filled(stage.grid, support.M) else pad)
            texts.append(str(replace(stage.mixer, support=support)))
        else:
            texts.append(str(stage.mixer))
    return replace(spec, mixer=by_stage(texts))


def check_padding(spec: ModelSpec, pad: Padding) -> None:
    """Raise InputError if a stage has windows that do not fill its grid and are padded otherwise than by `pad`."""
    for stage in spec.stages:
        support = stage.mixer.support
        if isinstance(support, Window) and support.pad != pad and not _filled(stage.grid, support.M):
            raise InputError(f"invalid mixer={str(stage.mixer)!r} on the grid {stage.grid}, which its windows do not "
                             f"fill; expected pad={pad}, as the library pads them")  # fmt: skip


def _filled(grid: Grid, side: int) -> bool:
    """Whether windows of this side fill the grid, or are cut to it."""
    return all(length <= side or length % side == 0 for length in grid)


def one_of_all(values: Sequence[Any], name: str) -> Any:
    """Return the value that all stages have. Raises InputError if they differ."""
    if len(set(values)) != 1:
        listed = ", ".join(map(str, dict.fromkeys(values)))
        raise InputError(f"invalid {name}={listed} over the stages; expected one value for all, as this library has")
    return values[0]


def unless_equal(values: Sequence[Any]) -> Any:
    """Return the value of all stages if it is the same, else the tuple of the values."""
    return values[0] if len(set(values)) == 1 else tuple(values)
