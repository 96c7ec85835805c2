"""The trunk of a model as the arguments of timm's class: read off a model, or off the shapes of its state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from timm.layers import LayerNorm, to_2tuple, to_ntuple
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.backbone import SAID_BY_RECORDS
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid
from kernelbank.weights.keymap import Shapes

Family = Literal["plain", "hierarchical"]
CLASSES: dict[Family, type[nn.Module]] = {"plain": VisionTransformer, "hierarchical": SwinTransformer}

# Widths whose heads are not 64 channels wide in the models that have them: ViT-H, ViT-g, ViT-G, SO400M
HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16, 1152: 16}
HEAD_CHANNELS = 64
IMAGE = 224
PLAIN_EPS, STAGES_EPS = 1e-6, 1e-5  # LayerNorm in timm's ViT and Swin
LAYER_SCALE = 1e-5  # where it starts in timm; a state overwrites it


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
"""Activations of an MLP that timm and a record both have, by their name in both."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A trunk: its family and the arguments of timm's class, `norm_eps` apart, as numbers and names.

    `pad` is what the code of the model does at windows that the grid does not fill (see `spec`), and `assumed` says
    in words what neither shapes nor a name told.
    """

    family: Family
    arguments: Mapping[str, Any]
    norm_eps: float
    pad: str = "masked"
    assumed: tuple[str, ...] = ()

    def build(self, **more: Any) -> Any:
        """timm's model of this architecture in eval mode; `more` are further arguments of its class."""
        arguments = dict(self.arguments)
        if "window_size" in arguments:  # two numbers would be height and width
            arguments["window_size"] = tuple((side, side) for side in arguments["window_size"])
        return CLASSES[self.family](**arguments, norm_layer=self.norm, weight_init="skip", **more).eval()

    @property
    def norm(self) -> Callable[..., nn.Module]:
        """The norm layer."""
        return partial(LayerNorm, eps=self.norm_eps)

    @property
    def image(self) -> Grid:
        """(H, W) in pixels."""
        height, width = self.arguments["img_size"]
        return height, width

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks by stage."""
        return tuple(self.arguments["depths"]) if self.family == "hierarchical" else (self.arguments["depth"],)

    def grids(self) -> tuple[Grid, ...]:
        """(H, W) in tokens by stage: merging halves, odd sides are padded up."""
        patch = to_2tuple(self.arguments["patch_size"])
        sides = [(self.image[0] // patch[0], self.image[1] // patch[1])]
        for _ in self.depths[1:]:
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        return tuple(sides)

    def windows(self) -> tuple[Grid, ...]:
        """(a, b) in tokens by stage: the window, cut to the grid."""
        wanted = zip(self.arguments["window_size"], self.grids(), strict=True)
        return tuple((min(side, grid[0]), min(side, grid[1])) for side, grid in wanted)

    def records(self) -> tuple[str, str]:
        """The mixer and the MLP of the blocks, as text."""
        biased = "" if self.arguments["qkv_bias"] else " bias=False"
        mlp = self._mlp()
        if self.family == "plain":
            return f"vit{biased}", mlp
        mixers = [
            f"swin support=window({side}, alternate{_padding(self.pad, side, grid)}){biased}"
            for side, grid in zip(self.arguments["window_size"], self.grids(), strict=True)
        ]
        return shortest(mixers), mlp

    def _mlp(self) -> str:
        ratios = to_ntuple(len(self.depths))(self.arguments["mlp_ratio"])
        biased = "" if self.arguments.get("proj_bias", True) else " bias=False"
        act = self.arguments.get("act_layer", "gelu")
        widths = [self.arguments["embed_dim"] * 2**stage for stage in range(len(self.depths))]
        hidden = [
            f"{ratio:.0f}C" if ratio == int(ratio) else str(int(width * ratio))
            for width, ratio in zip(widths, ratios, strict=True)
        ]
        return shortest([f"ffn bank=static({kernels}) activation={act}{biased}" for kernels in hidden])

    def trunk(self) -> dict[str, Any]:
        """The arguments of our backbone of this architecture, without its records."""
        said = {*SAID_BY_RECORDS, "window_size"}
        taken = {name: value for name, value in self.arguments.items() if name not in said}
        return taken | {"norm_layer": self.norm}


def _padding(pad: str, side: int, grid: Grid) -> str:
    return f", pad={pad}" if pad != "masked" and any(length > side and length % side for length in grid) else ""


def shortest(texts: Sequence[str]) -> str:
    """Records of each stage as their shortest text, once if they are all the same."""
    texts = [str(MixerSpec.parse(text)) for text in texts]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)


# ---- read off the shapes of a state ----------------------------------------------------------------------


def infer(family: Family, state: Mapping[str, Tensor], img_size: Grid | None = None) -> Architecture:
    """The architecture of a state under timm's keys. What shapes do not tell follows stated conventions.

    Raises InputError for a state without the tensors that are read, and for images that are not square while
    `img_size` is not given.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        return _INFER[family](shapes, img_size)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the architecture cannot be read off the shapes ({error}): name it with --model") from None


def _infer_plain(shapes: Shapes, img_size: Grid | None) -> Architecture:
    width, channels, height, breadth = shapes["patch_embed.proj.weight"]
    first, assumed = "blocks.0", [f"norm eps {PLAIN_EPS:g}"]
    hidden = shapes[f"{first}.mlp.fc1.weight"][0]
    if f"{first}.attn.q_norm.weight" in shapes:
        heads = width // shapes[f"{first}.attn.q_norm.weight"][0]
    else:
        heads = HEADS_OF_WIDTH.get(width) or max(width // HEAD_CHANNELS, 1)
        assumed.append(f"{heads} heads of {width // heads} channels")
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    positions = shapes["pos_embed"][1] if "pos_embed" in shapes else None
    prefix, no_embed_class = class_token + registers, False
    if positions is None:
        image = img_size or (IMAGE, IMAGE)
        assumed += [] if img_size else [f"images of {IMAGE} x {IMAGE}"]
    elif img_size:
        image = img_size
        no_embed_class = bool(prefix) and positions == (image[0] // height) * (image[1] // breadth)
    else:
        fits = [bare for bare in ((False, True) if prefix else (False,)) if _root(positions - prefix * (not bare))]
        if len(fits) != 1:
            raise InputError(f"pos_embed has {positions} positions, {prefix} tokens before the grid: the sides of the "
                             "image are not known; give them with --img-size")  # fmt: skip
        no_embed_class = fits[0]
        side = math.isqrt(positions - prefix * (not no_embed_class))
        image = (side * height, side * breadth)
        assumed.append("square images")
    pooled = "fc_norm.weight" in shapes or not class_token
    return Architecture(
        family="plain",
        norm_eps=PLAIN_EPS,
        arguments={
            "img_size": image, "patch_size": (height, breadth), "in_chans": channels,
            "num_classes": shapes.get("head.weight", (0,))[0], "global_pool": "avg" if pooled else "token",
            "embed_dim": width, "depth": _count(shapes, "blocks."), "num_heads": heads, "mlp_ratio": hidden / width,
            "qkv_bias": f"{first}.attn.qkv.bias" in shapes, "qk_norm": f"{first}.attn.q_norm.weight" in shapes,
            "proj_bias": f"{first}.attn.proj.bias" in shapes,
            "init_values": LAYER_SCALE if f"{first}.ls1.gamma" in shapes else None, "class_token": class_token,
            "pos_embed": "none" if positions is None else "learn", "no_embed_class": no_embed_class,
            "reg_tokens": registers, "pre_norm": "norm_pre.weight" in shapes,
            "final_norm": "norm.weight" in shapes or "fc_norm.weight" in shapes, "fc_norm": "fc_norm.weight" in shapes,
            "act_layer": "gelu",
        },
        assumed=tuple(assumed),
    )  # fmt: skip


def _infer_stages(shapes: Shapes, img_size: Grid | None) -> Architecture:
    width, channels, height, breadth = shapes["patch_embed.proj.weight"]
    stages = _count(shapes, "layers.")
    tables = [shapes[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(stages)]
    sides = [(_root(offsets) + 1) // 2 for offsets, _ in tables]
    window, assumed = max(sides), [f"norm eps {STAGES_EPS:g}"]
    image = img_size
    if image is None:  # a table smaller than the others is cut to its grid; else the last stage is one window
        cut = next((i for i, side in enumerate(sides) if side < window), stages - 1)
        image = (sides[cut] * height * 2**cut, sides[cut] * breadth * 2**cut)
        assumed += [f"images of {image[0]} x {image[1]}"]
    ratios = [shapes[f"layers.{i}.blocks.0.mlp.fc1.weight"][0] / (width * 2**i) for i in range(stages)]
    return Architecture(
        family="hierarchical",
        norm_eps=STAGES_EPS,
        arguments={
            "img_size": image, "patch_size": (height, breadth), "in_chans": channels,
            "num_classes": shapes.get("head.fc.weight", (0,))[0], "global_pool": "avg", "embed_dim": width,
            "depths": [_count(shapes, f"layers.{i}.blocks.") for i in range(stages)],
            "num_heads": [heads for _, heads in tables], "window_size": [window] * stages,
            "mlp_ratio": ratios[0] if len(set(ratios)) == 1 else ratios,
            "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in shapes,
        },
        assumed=tuple(assumed),
    )  # fmt: skip


_INFER: dict[Family, Callable[[Shapes, Grid | None], Architecture]] = {
    "plain": _infer_plain,
    "hierarchical": _infer_stages,
}


def _count(shapes: Shapes, before: str) -> int:
    """How many numbers follow `before` in the keys."""
    return len({key[len(before) :].partition(".")[0] for key in shapes if key.startswith(before)})


def _root(number: int) -> int:
    """The square root of a square number, else 0."""
    root = math.isqrt(max(number, 0))
    return root if root * root == number else 0
