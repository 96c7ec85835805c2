"""timm entry points: ``import kernelbank.models`` registers every model of the atlas, nothing else does.

``timm.create_model("vit_kb_small_patch16_224", mixer="vit activation=relu,count position=relative", mlp="ffn")``:
`mixer` and `mlp` are specs as text, so that a saved configuration and a pushed model hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, vision_transformer
from torch import Tensor, nn

from kernelbank.model import ModelSpec, ViTTrunk
from kernelbank.nn.backbone import Backbone, HierarchicalBackbone, PlainBackbone
from kernelbank.nn.build import backbone_arguments
from kernelbank.nn.state import translate
from kernelbank.nn.transform import Placement, move_all
from kernelbank.spec import Window
from kernelbank.spec.inventory import Grid, inventory
from kernelbank.zoo import MODELS

__all__: list[str] = []  # register_model adds every entry point

LARGEST_SIDE = 129  # of a grid that is guessed from a checkpoint without a configuration


def _cfg(spec: ModelSpec) -> dict[str, Any]:
    """timm's data configuration: input, crop and normalisation of DeiT and Swin."""
    shared = {
        "url": "", "num_classes": spec.num_classes, "input_size": (spec.in_chans, *spec.image), "crop_pct": 0.9,
        "interpolation": "bicubic", "fixed_input_size": True, "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj", "license": "apache-2.0",
    }  # fmt: skip
    if isinstance(spec.trunk, ViTTrunk):
        return shared | {"pool_size": None, "classifier": "head"}
    return shared | {"pool_size": spec.stages[-1].grid, "classifier": "head.fc"}


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(spec) for name, spec in MODELS.items()})


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of another resolution on the grid of `model`: the position embedding as timm resamples it, tables
    and the matrices of `project` as `nn.edit.carry` does. timm's names of attention and MLP are taken too."""
    assert isinstance(model, Backbone)
    for path, mixer, _ in model.mixers_on(_grid(model)):
        translate(state, f"{path}.", mixer.spec, mixer.entries)
    source = _source_grid(state, model)
    for path, mixer, grid in model.mixers_on(source):
        tensors = {entry.name: state[f"{path}.{entry.name}"] for entry in mixer.entries
                if f"{path}.{entry.name}" in state}  # fmt: skip
        before, after = Placement(mixer.spec, grid, mixer.prefix), Placement(mixer.spec, mixer.grid, mixer.prefix)
        moved = move_all(tensors, mixer.entries, before, after)
        state |= {f"{path}.{name}": tensor for name, tensor in moved.items()}
    return vision_transformer.checkpoint_filter_fn(state, model) if isinstance(model, PlainBackbone) else state


def _grid(model: Backbone) -> Grid:
    """The grid of patches of `model`."""
    height, width = model.patch_embed.grid_size
    return height, width


def _source_grid(state: Mapping[str, Tensor], model: Backbone) -> Grid:
    """The grid of patches of a checkpoint: what its configuration says, else the model's own, else a square, whichever
    explains the shapes. The model's own where none does: what does not load is then named."""
    config = getattr(model, "pretrained_cfg", {"input_size": model.patch_embed.img_size})
    stated = getattr(model, "pretrained_model_args", {}).get("img_size") or config["input_size"][-2:]
    patch = state["patch_embed.proj.weight"].shape[-2:] if "patch_embed.proj.weight" in state else (1, 1)
    height, width = (side // step for side, step in zip(to_2tuple(stated), patch, strict=True))
    own = _grid(model)
    squares = [(side, side) for side in range(1, LARGEST_SIDE)]
    return next((grid for grid in [(height, width), own, *squares] if _explains(grid, state, model)), own)


def _explains(grid: Grid, state: Mapping[str, Tensor], model: Backbone) -> bool:
    """Whether the tensors of a checkpoint have the shapes of `model` with patches on `grid`. Windows of another side
    are resampled whatever the grid."""
    if min(grid) < 1:
        return False
    return all(
        f"{path}.{entry.name}" not in state or state[f"{path}.{entry.name}"].shape == entry.shape
        for path, mixer, own_grid in model.mixers_on(grid)
        if not isinstance(mixer.spec.support, Window)
        for entry in inventory(mixer.spec, mixer.dim, mixer.num_heads, own_grid, mixer.prefix)
    )


def _entry_point(name: str, spec: ModelSpec) -> Callable[..., Backbone]:
    backbone: type[Backbone] = HierarchicalBackbone
    features: dict[str, Any] = {"flatten_sequential": True, "out_indices": tuple(range(len(spec.stages)))}
    if isinstance(spec.trunk, ViTTrunk):
        backbone, features = PlainBackbone, {"feature_cls": "getter", "out_indices": 3}
    arguments = {
        option: value
        for option, value in backbone_arguments(spec).items()
        if option not in ("img_size", "in_chans", "num_classes")  # timm takes them from the data configuration
    }

    def entry_point(pretrained: bool = False, **kwargs: Any) -> Backbone:
        chosen = {"out_indices": kwargs.pop("out_indices")} if "out_indices" in kwargs else {}
        return build_model_with_cfg(
            backbone, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features | chosen,
            **(arguments | kwargs),
        )  # fmt: skip

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"{spec.mixer} as mixer, {spec.mlp} as MLP, images of {spec.image[0]} x {spec.image[1]}."
    return entry_point


for _name, _spec in MODELS.items():
    globals()[_name] = register_model(_entry_point(_name, _spec))
