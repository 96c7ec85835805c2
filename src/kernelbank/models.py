"""timm entry points: ``import kernelbank.models`` registers every model of the atlas, nothing else does.

``timm.create_model("vit_kb_small_patch16_224", mixer="vit activation=relu,count position=relative", mlp="ffn")``:
`mixer` and `mlp` are records as text, so that a saved configuration and a pushed model hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, vision_transformer
from timm.models._input import get_pretrained_grid_size
from torch import Tensor, nn

from kernelbank.atlas import MODELS, Model
from kernelbank.inventory import Grid
from kernelbank.nn.backbone import Backbone, HierarchicalBackbone, PlainBackbone, trunk_arguments
from kernelbank.nn.mixer import Mixer, accept_timm_names
from kernelbank.nn.transform import Site, move
from kernelbank.spec import SpecError

__all__: list[str] = []  # register_model adds every entry point

STAGES_DOWN = 8  # patch merging halves the grid three times


def _cfg(model: Model) -> dict[str, Any]:
    """timm's data configuration: input, crop and normalisation of DeiT and Swin."""
    side, skeleton = model.img_size, model.skeleton
    shared = {
        "url": "", "num_classes": 1000, "input_size": (3, side, side), "crop_pct": 0.9, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "license": "apache-2.0",
    }  # fmt: skip
    if not skeleton.hierarchical:
        return shared | {"pool_size": None, "classifier": "head"}
    last = -(-side // skeleton.patch_size // STAGES_DOWN)
    return shared | {"pool_size": (last, last), "classifier": "head.fc"}


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(model) for name, model in MODELS.items()})


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of another resolution on the grid of `model`: the position embedding as timm resamples it, tables
    and the matrices of `project` as `nn.carry` does. timm's names of attention and MLP are taken too.

    Raises SpecError for a matrix whose rows are no square grid, unless the checkpoint's configuration says which.
    """
    if isinstance(model, PlainBackbone):
        state = vision_transformer.checkpoint_filter_fn(state, model)
    for path, mixer in model.named_modules():
        if isinstance(mixer, Mixer):
            accept_timm_names(mixer, state, f"{path}.")
            for entry in mixer.entries:
                tensor = state.get(f"{path}.{entry.name}")
                if tensor is not None and tensor.shape != entry.shape:
                    source = Site(mixer.spec, _grid_of(entry.name, tensor, mixer, state, model), mixer.prefix)
                    moved = move(tensor, entry, source, Site(mixer.spec, mixer.grid, mixer.prefix))
                    state[f"{path}.{entry.name}"] = tensor if moved is None else moved[0]
    return state


def _grid_of(name: str, tensor: Tensor, mixer: Mixer, state: dict[str, Tensor], model: nn.Module) -> Grid:
    """The grid that a tensor of a checkpoint belongs to; the mixer's own where it does not depend on the grid."""
    if name == "table.weight":
        return (tensor.shape[1] + 1) // 2, (tensor.shape[2] + 1) // 2
    if name not in ("E", "F"):
        return mixer.grid
    cells = tensor.shape[0] - mixer.prefix
    grid = get_pretrained_grid_size(model, state.get("patch_embed.proj.weight"), cells)
    side = math.isqrt(cells)
    if grid is None and side * side != cells:
        raise SpecError(f"{name}: {cells} rows of a checkpoint are no square grid; legal: a square, or a checkpoint "
                        "whose configuration says its img_size")  # fmt: skip
    return grid or (side, side)


def _entry_point(name: str, model: Model) -> Callable[..., Backbone]:
    backbone = HierarchicalBackbone if model.skeleton.hierarchical else PlainBackbone
    features: dict[str, Any] = {"feature_cls": "getter", "out_indices": 3}
    if model.skeleton.hierarchical:
        features = {"flatten_sequential": True, "out_indices": tuple(range(len(model.skeleton.depths)))}
    arguments = {"mixer": model.mixer, "mlp": model.mlp, **trunk_arguments(model.skeleton)}

    def entry_point(pretrained: bool = False, **kwargs: Any) -> Backbone:
        chosen = {"out_indices": kwargs.pop("out_indices")} if "out_indices" in kwargs else {}
        return build_model_with_cfg(
            backbone, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features | chosen,
            **(arguments | kwargs),
        )  # fmt: skip

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"{model.mixer} as mixer, {model.mlp} as MLP, images of {model.img_size} x {model.img_size}."
    return entry_point


for _name, _model in MODELS.items():
    globals()[_name] = register_model(_entry_point(_name, _model))
