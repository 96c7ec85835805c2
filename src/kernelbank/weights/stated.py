"""The description of a model from the ``config.json`` beside its weights, as transformers or timm write it: what the
shapes of the weights do not tell is stated there, and nothing is assumed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn

from kernelbank.errors import InputError, require
from kernelbank.model import Grid, ModelSpec, SwinTrunk, ViTTrunk, by_stage, with_window
from kernelbank.text import one_line, printable
from kernelbank.weights.dialects.dialect import Run
from kernelbank.weights.dialects.huggingface import HIDDEN_ACT, call, load
from kernelbank.weights.dialects.huggingface_towers import call_pooled, call_tokens
from kernelbank.weights.infer import Family, Inferred, infer
from kernelbank.weights.keymap import State
from kernelbank.weights.stock import mlp_text, mlp_width

KINDS: dict[str, tuple[str, str, Callable[[nn.Module, Tensor], Tensor]]] = {
    "vit": ("ViTModel", "ViTForImageClassification", call),
    "vit_mae": ("ViTMAEModel", "ViTMAEModel", call),
    "swin": ("SwinModel", "SwinForImageClassification", call),
    "dinov2": ("Dinov2Model", "Dinov2Model", call_pooled),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersModel", call_pooled),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection", call_pooled),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionModel", call_tokens),
}
"""The classes of transformers by model type, without and with a head, and how a model is run."""
OPTIONS: dict[str, dict[str, Any]] = {"vit_mae": {"mask_ratio": 0.0}, "siglip_vision_model": {"vision_use_head": False}}
"""The fields of a configuration that are changed: no patch is masked, and the tokens are the output."""
UNHELD = {"use_swiglu_ffn": "SwiGLU in the MLPs", "use_absolute_embeddings": "absolute position embeddings"}
"""The switches of a configuration that no trunk has a place for."""


def read_config(config: Mapping[str, Any], where: str) -> Any:
    """Return the configuration of a vision model of transformers, with its defaults; of CLIP's two towers, the vision
    tower.

    Raises:
        InputError: If transformers is missing, or the configuration is of another model or damaged.
    """
    require("a folder of transformers", "hf", "transformers")
    kind = config.get("model_type")
    inner = config.get("vision_config")
    if isinstance(inner, Mapping):
        projection = {key: value for key, value in config.items() if key == "projection_dim"}  # CLIP's is outside
        return read_config({"model_type": f"{kind}_vision_model", **inner, **projection}, where)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: invalid model_type={printable(repr(kind))}; expected {', '.join(KINDS)}, or a "
                         "folder of timm with its architecture")  # fmt: skip
    fields = {key: value for key, value in config.items() if key != "model_type"} | OPTIONS.get(kind, {})
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # transformers warns about itself
            stated = import_module("transformers").AutoConfig.for_model(kind, **fields)
    except Exception as error:  # its validation raises errors of huggingface_hub, TypeError, ValueError, ...
        raise InputError(f"{where}: invalid configuration: {one_line(error, 200)}") from None
    for switch, what in UNHELD.items():
        if getattr(stated, switch, False):
            raise InputError(f"{where}: invalid {switch}=True: {what}, which our trunks have no place for; expected "
                             "False")  # fmt: skip
    return stated


def describe(config: Any, family: Family, pivot: State, where: str) -> Inferred:
    """The model of a configuration of transformers whose weights are `pivot`, under timm's keys. Raises InputError
    naming a field of the configuration that no model of ours has."""
    activations = {theirs: ours for ours, theirs in HIDDEN_ACT.items()}
    if config.hidden_act not in activations:
        raise InputError(f"{where}: invalid hidden_act={printable(repr(config.hidden_act))}; expected "
                         f"{', '.join(activations)}")  # fmt: skip
    spec = infer(family, pivot, _image(config.image_size)).spec
    mlps = []
    for stage in spec.stages:
        assert stage.mlp is not None
        mlps.append(mlp_text(stage.dim, mlp_width(stage), activations[config.hidden_act], stage.mlp.bias))
    trunk: ViTTrunk | SwinTrunk
    if isinstance(spec.trunk, ViTTrunk):
        heads, width = config.num_attention_heads, spec.trunk.embed_dim
        if width % heads:
            raise InputError(f"{where}: invalid num_attention_heads={heads}; expected a divisor of {width} channels")
        trunk = replace(spec.trunk, num_heads=heads, norm_eps=config.layer_norm_eps)
        return Inferred(replace(spec, trunk=trunk, mlp=by_stage(mlps)))
    trunk = replace(cast(SwinTrunk, spec.trunk), norm_eps=config.layer_norm_eps)
    mixer = with_window(cast(str, spec.mixer), config.window_size)
    return Inferred(replace(spec, trunk=trunk, mixer=mixer, mlp=by_stage(mlps)))


def model(config: Any, spec: ModelSpec, state: State) -> Run:
    """The model that transformers builds from the configuration, with the weights of `state`, in eval mode and float32.
    Raises InputError if it refuses them."""
    bare, whole, run = KINDS[config.model_type]
    wide = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    kind = getattr(import_module("transformers"), whole if spec.num_classes else bare)
    config.num_labels = spec.num_classes
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # transformers warns about itself
        built = load(kind(config), wide)
    built.eval()
    return lambda images: run(built, images)


def _image(size: object) -> Grid:
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise InputError(f"invalid image_size={printable(repr(size))}; expected a side, or height and width")
    return cast(Grid, sides)
