"""The description of a model from the shapes of its state under timm's keys, and what the shapes do not tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernelbank.errors import InputError, SpecError
from kernelbank.model import Grid, ModelSpec, SwinTrunk, ViTTrunk, by_stage
from kernelbank.weights.keymap import Shapes
from kernelbank.weights.stock import mlp_text

Family = Literal["vit", "swin"]

# Widths whose heads are not 64 channels wide in the models that have them: ViT-H, ViT-g, ViT-G, SO400M.
HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16, 1152: 16}
HEAD_CHANNELS = 64
IMAGE = 224
LAYER_SCALE = 1e-5
"""The value that timm initialises LayerScale with; a state overwrites it."""


@dataclass(frozen=True)
class Inferred:
    """A description, and in words what was assumed where neither shapes nor a name tell it."""

    spec: ModelSpec
    assumed: tuple[str, ...] = ()


def infer(family: Family, state: Mapping[str, Tensor], img_size: Grid | None = None) -> Inferred:
    """The model of a state under timm's keys. What the shapes do not tell follows the conventions of the published
    models and is listed.

    Raises:
        InputError: If a tensor that is read is missing, or images that are not square need `img_size`.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        return _INFER[family](shapes, img_size)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, InputError) or (img_size is not None and isinstance(error, SpecError)):
            raise  # of images of this size
        raise InputError(f"the shapes do not tell the model ({error}); name it with --model") from None


def _infer_vit(shapes: Shapes, img_size: Grid | None) -> Inferred:
    width, channels, height, breadth = shapes["patch_embed.proj.weight"]
    first = "blocks.0"
    assumed = [f"norm eps {ViTTrunk.norm_eps:g}", "GELU", "norms before the branches", "attention scale d^-1/2"]
    normed = f"{first}.attn.q_norm.weight" in shapes
    if normed:
        heads = width // shapes[f"{first}.attn.q_norm.weight"][0]
    else:
        heads = HEADS_OF_WIDTH.get(width) or max(width // HEAD_CHANNELS, 1)
        assumed.append(f"{heads} heads of {width // heads} channels")
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    image, no_embed_class, noted = _image(shapes, (height, breadth), class_token + registers, img_size)
    biased = f"{first}.attn.qkv.bias" in shapes
    trunk = ViTTrunk(
        patch_size=(height, breadth), embed_dim=width, depth=_count(shapes, "blocks."), num_heads=heads,
        class_token=class_token, reg_tokens=registers, pos_embed="learn" if "pos_embed" in shapes else "none",
        no_embed_class=no_embed_class,
        global_pool="avg" if "fc_norm.weight" in shapes or not class_token else "token",
        pre_norm="norm_pre.weight" in shapes, fc_norm="fc_norm.weight" in shapes,
        final_norm="norm.weight" in shapes or "fc_norm.weight" in shapes,
        init_values=LAYER_SCALE if f"{first}.ls1.gamma" in shapes else None,
    )  # fmt: skip
    spec = ModelSpec(
        trunk=trunk, mixer=("vit_qk_norm" if normed else "vit") + ("" if biased else " bias=False"), img_size=image,
        in_chans=channels,
        mlp=mlp_text(width, shapes[f"{first}.mlp.fc1.weight"][0], "gelu", f"{first}.attn.proj.bias" in shapes),
        num_classes=shapes.get("head.weight", (0,))[0],
    )  # fmt: skip
    return Inferred(spec, (*assumed, *noted))


def _image(shapes: Shapes, patch: Grid, prefix: int, img_size: Grid | None) -> tuple[Grid, bool, list[str]]:
    """(the image in pixels, whether the position embedding leaves out the prefix, what was assumed)."""
    if "pos_embed" not in shapes:
        return img_size or (IMAGE, IMAGE), False, [] if img_size else [f"images of {IMAGE} x {IMAGE}"]
    positions = shapes["pos_embed"][1]
    if img_size:
        bare = bool(prefix) and positions == (img_size[0] // patch[0]) * (img_size[1] // patch[1])
        return img_size, bare, []
    fits = [bare for bare in ((False, True) if prefix else (False,)) if _root(positions - prefix * (not bare))]
    if len(fits) != 1:
        raise InputError(f"pos_embed has {positions} positions and there are {prefix} prefix tokens, which does not "
                         "tell the sides of the image; give them with --img-size")  # fmt: skip
    side = math.isqrt(positions - prefix * (not fits[0]))
    return (side * patch[0], side * patch[1]), fits[0], ["square images"]


def _infer_swin(shapes: Shapes, img_size: Grid | None) -> Inferred:
    width, channels, height, breadth = shapes["patch_embed.proj.weight"]
    stages = _count(shapes, "layers.")
    tables = [shapes[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
    sides = [(_root(offsets) + 1) // 2 for offsets, _ in tables]
    window = max(sides)
    assumed = [f"norm eps {SwinTrunk.norm_eps:g}", "GELU", "norms before the branches", "attention scale d^-1/2"]
    image = img_size
    if image is None:  # a table smaller than the others is cut to its grid; else the last stage is one window
        cut = next((i for i, side in enumerate(sides) if side < window), stages - 1)
        image = (sides[cut] * height * 2**cut, sides[cut] * breadth * 2**cut)
        assumed += [f"images of {image[0]} x {image[1]}"]
    biased = "" if "layers.0.blocks.0.attn.qkv.bias" in shapes else " bias=False"
    mlps = [
        mlp_text(width * 2**i, shapes[f"layers.{i}.blocks.0.mlp.fc1.weight"][0], "gelu", True) for i in range(stages)
    ]
    trunk = SwinTrunk(
        patch_size=(height, breadth), embed_dim=width, num_heads=tuple(heads for _, heads in tables),
        depths=tuple(_count(shapes, f"layers.{i}.blocks.") for i in range(stages)),
    )  # fmt: skip
    spec = ModelSpec(
        trunk=trunk, mixer=f"swin support=window({window}, alternate){biased}", mlp=by_stage(mlps), img_size=image,
        in_chans=channels, num_classes=shapes.get("head.fc.weight", (0,))[0],
    )  # fmt: skip
    return Inferred(spec, tuple(assumed))


_INFER: dict[Family, Callable[[Shapes, Grid | None], Inferred]] = {"vit": _infer_vit, "swin": _infer_swin}


def _count(shapes: Shapes, before: str) -> int:
    """How many numbers follow `before` in the keys."""
    return len({key[len(before) :].partition(".")[0] for key in shapes if key.startswith(before)})


def _root(number: int) -> int:
    """The square root of a square number, else 0."""
    root = math.isqrt(max(number, 0))
    return root if root * root == number else 0
