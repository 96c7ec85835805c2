"""The models that dialects belong to, built by their own libraries: what a proof runs."""

from __future__ import annotations

import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from timm.layers import to_2tuple
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.weights.architecture import Architecture
from kernelbank.weights.dialects import Dialect
from kernelbank.weights.keymap import State, listed

Call = Callable[[nn.Module, Tensor], Tensor]
"""A model and images (B, C, H, W) -> logits, or the features before the head where there is none: (B, n)."""


class Absent(Exception):
    """A library that is not installed, or cannot be imported or build the model; the message is what to do."""


def _strictly(model: nn.Module, state: State) -> nn.Module:
    """`model` with `state`. Raises InputError for a tensor that is missing, left over or of another shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"the library refuses the tensors: {_line(error)}") from None
    return model


@dataclass(frozen=True)
class Library:
    """Whose model it is: `build` makes it, `call` runs it, `load` gives it a state; `install` says what to do where it
    is not there."""

    install: str
    build: Callable[[Architecture, Dialect], nn.Module]
    call: Call
    load: Callable[[nn.Module, State], nn.Module] = _strictly


def model_of(dialect: Dialect, architecture: Architecture, state: State) -> Callable[[Tensor], Tensor]:
    """The dialect's own model with the weights of `state`, in eval mode and float32.

    Raises Absent where its library is not there, InputError where the library refuses the state.
    """
    library = LIBRARIES[dialect.library]
    whole = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of other libraries, about themselves
            model = library.load(library.build(architecture, dialect), whole)
    except (ImportError, AssertionError) as error:
        raise Absent(f"{library.install} ({_line(error)})") from None
    model.eval()
    return lambda images: library.call(model, images)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _needs(module: str) -> None:
    if find_spec(module) is None:
        raise ImportError(f"no module {module}")


def _plainly(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


# ---- timm, and files with its names ----------------------------------------------------------------------


def _timm(architecture: Architecture, dialect: Dialect) -> nn.Module:
    return architecture.build()


def _facebook(architecture: Architecture, dialect: Dialect) -> nn.Module:
    raise ImportError("facebookresearch/deit is no package")


# ---- microsoft/Swin-Transformer: no package, one file on the path ----------------------------------------


def _microsoft(architecture: Architecture, dialect: Dialect) -> nn.Module:
    arguments = architecture.arguments
    return _microsoft_module().SwinTransformer(
        img_size=architecture.image, patch_size=arguments["patch_size"][0], in_chans=arguments["in_chans"],
        num_classes=arguments["num_classes"], embed_dim=arguments["embed_dim"], depths=list(architecture.depths),
        num_heads=list(arguments["num_heads"]), window_size=_one(arguments["window_size"], "window_size"),
        mlp_ratio=_one(arguments["mlp_ratio"], "mlp_ratio"), qkv_bias=arguments["qkv_bias"],
    )  # fmt: skip


def _microsoft_module() -> ModuleType:
    """models/swin_transformer.py of the repository, if its root is on the path: that file alone is imported, not the
    package around it."""
    package = PathFinder.find_spec("models", sys.path)
    for folder in (package.submodule_search_locations if package else None) or ():
        path = Path(folder) / "swin_transformer.py"
        if path.is_file() and "class SwinTransformer(" in path.read_text(encoding="utf-8"):
            spec = importlib.util.spec_from_file_location("microsoft_swin_transformer", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError("no models/swin_transformer.py")


# ---- torchvision -----------------------------------------------------------------------------------------


def _torchvision(architecture: Architecture, dialect: Dialect) -> nn.Module:
    _needs("torchvision")
    from torchvision.models.swin_transformer import SwinTransformer  # noqa: PLC0415

    arguments = architecture.arguments
    window = _one(arguments["window_size"], "window_size")
    if any(window > min(grid) for grid in architecture.grids()):
        raise InputError(f"torchvision does not cut windows of {window} to the grids {architecture.grids()}")
    model = SwinTransformer(
        list(to_2tuple(arguments["patch_size"])), arguments["embed_dim"], list(architecture.depths),
        list(arguments["num_heads"]), [window, window], _one(arguments["mlp_ratio"], "mlp_ratio"),
        num_classes=max(arguments["num_classes"], 1),
    )  # fmt: skip
    if not arguments["num_classes"]:
        model.head = nn.Identity()
    return model


# ---- Hugging Face ----------------------------------------------------------------------------------------


def _hugging_face(architecture: Architecture, dialect: Dialect) -> nn.Module:
    """transformers 5 reads the keys of both versions, transformers 4 its own."""
    _needs("transformers")
    import transformers  # noqa: PLC0415

    arguments, version = architecture.arguments, transformers.__version__
    if dialect.library == "huggingface" and int(version.partition(".")[0]) < 5:
        raise ImportError(f"transformers {version} has other keys")
    shared = {
        "num_labels": arguments["num_classes"], "num_channels": arguments["in_chans"],
        "hidden_act": arguments.get("act_layer", "gelu"),
        "layer_norm_eps": architecture.norm_eps, "qkv_bias": arguments["qkv_bias"],
    }  # fmt: skip
    bare = dialect.name.endswith("-bare")
    if architecture.family == "plain":
        config: Any = transformers.ViTConfig(
            hidden_size=arguments["embed_dim"], num_hidden_layers=arguments["depth"],
            num_attention_heads=arguments["num_heads"], image_size=architecture.image,
            intermediate_size=round(arguments["embed_dim"] * arguments["mlp_ratio"]),
            patch_size=arguments["patch_size"], **shared,
        )  # fmt: skip
        if bare:
            return cast(nn.Module, transformers.ViTModel(config, add_pooling_layer=False))
        return cast(nn.Module, transformers.ViTForImageClassification(config))
    config = transformers.SwinConfig(
        image_size=architecture.image[0], patch_size=arguments["patch_size"][0], embed_dim=arguments["embed_dim"],
        depths=list(architecture.depths), num_heads=list(arguments["num_heads"]),
        window_size=_one(arguments["window_size"], "window_size"),
        mlp_ratio=_one(arguments["mlp_ratio"], "mlp_ratio"), **shared,
    )  # fmt: skip
    return cast(nn.Module, transformers.SwinModel(config) if bare else transformers.SwinForImageClassification(config))


def _hugging_face_load(model: Any, state: State) -> nn.Module:
    """transformers' own loading, which knows the keys of its earlier versions."""
    pooling = {"add_pooling_layer": False} if type(model).__name__ == "ViTModel" else {}
    loaded, told = type(model).from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True, **pooling
    )
    if wrong := [*told["missing_keys"], *told["unexpected_keys"], *map(str, told["mismatched_keys"])]:
        raise InputError(f"the library refuses the tensors: {listed(wrong)}")
    return cast(nn.Module, loaded)


def _hugging_face_call(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    if "logits" in out:
        return out.logits
    pooled = out.get("pooler_output")
    return out.last_hidden_state[:, 0] if pooled is None else pooled


# ---- mmpretrain ------------------------------------------------------------------------------------------


def _mmpretrain(architecture: Architecture, dialect: Dialect) -> nn.Module:
    _needs("mmpretrain")
    from mmpretrain.models import build_backbone, build_classifier  # noqa: PLC0415

    arguments = architecture.arguments
    bare = dialect.name.endswith("-bare")
    neck: dict[str, Any] | None = None
    if architecture.family == "plain":
        backbone = {
            "type": "VisionTransformer", "img_size": architecture.image, "patch_size": arguments["patch_size"],
            "in_channels": arguments["in_chans"], "qkv_bias": arguments["qkv_bias"],
            "out_type": "avg_featmap" if arguments["global_pool"] == "avg" else "cls_token",
            "final_norm": arguments["final_norm"] and not arguments["fc_norm"], "pre_norm": arguments["pre_norm"],
            "with_cls_token": arguments["class_token"],
            "layer_scale_init_value": arguments["init_values"] or 0.0,
            "arch": {
                "embed_dims": arguments["embed_dim"], "num_layers": arguments["depth"],
                "num_heads": arguments["num_heads"],
                "feedforward_channels": round(arguments["embed_dim"] * arguments["mlp_ratio"]),
            },
        }  # fmt: skip
        width = arguments["embed_dim"]
        head = {"type": "LinearClsHead" if dialect.name == "mmpretrain-linear" else "VisionTransformerClsHead"}
    else:
        backbone = {
            "type": "SwinTransformer", "img_size": architecture.image, "patch_size": arguments["patch_size"],
            "in_channels": arguments["in_chans"], "window_size": _one(arguments["window_size"], "window_size"),
            "arch": {
                "embed_dims": arguments["embed_dim"], "depths": list(architecture.depths),
                "num_heads": list(arguments["num_heads"]),
            },
        }  # fmt: skip
        width, neck = arguments["embed_dim"] * 2 ** (len(architecture.depths) - 1), {"type": "GlobalAveragePooling"}
        head = {"type": "LinearClsHead"}
    if bare:
        model: nn.Module = build_backbone(backbone)
        return model
    classes = {"in_channels": width, "num_classes": arguments["num_classes"]}
    model = build_classifier({
        "type": "ImageClassifier", "backbone": backbone, "neck": neck,
        "head": {**head, **classes} if arguments["num_classes"] else None,
    })  # fmt: skip
    return model


def _mmpretrain_call(model: nn.Module, images: Tensor) -> Tensor:
    out = model(images)
    last = out[-1] if isinstance(out, (tuple, list)) else out
    return last.mean((2, 3)) if last.ndim == 4 else last


def _one(values: Any, name: str) -> Any:
    """The one value that all stages have. Raises InputError where they differ."""
    different = list(dict.fromkeys(values)) if isinstance(values, (list, tuple)) else [values]
    if len(different) != 1:
        raise InputError(f"{name} differs between stages, {listed(map(str, different))}: this library has one for all")
    return different[0]


LIBRARIES: dict[str, Library] = {
    "timm": Library("install timm", _timm, _plainly),
    "facebook": Library("keys and shapes are checked alone", _facebook, _plainly),
    "microsoft": Library("install microsoft/Swin-Transformer: its folder on PYTHONPATH", _microsoft, _plainly),
    "torchvision": Library("install torchvision", _torchvision, _plainly),
    "huggingface": Library("install 'transformers>=5'", _hugging_face, _hugging_face_call, _hugging_face_load),
    "huggingface4": Library("install transformers", _hugging_face, _hugging_face_call, _hugging_face_load),
    "mmpretrain": Library("install mmpretrain", _mmpretrain, _mmpretrain_call),
}
