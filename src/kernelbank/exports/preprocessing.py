"""What a program needs besides an exported file: how a picture becomes the input, and the names of the classes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn

from kernelbank.schema import decode

ENTRY = "kernelbank"
"""The key of the entry in a file's metadata, a JSON object with ``preprocessing`` and ``dtype``."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the input (C, H, W) of a model.

    The centre of the picture, `crop_pct` of its shorter side for a square input, is resampled to H x W with
    `interpolation`. Pixels from 0 to 255 become (pixel / 255 * white - mean) / std per channel. `class_names` are in
    the order of the outputs; there are none for a model without a classifier.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 1.0
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """What timm's data configuration of `model` says, at the image size of its patch embedding. The names are
        those of ImageNet, or of a larger set of its classes, if the model has this number of classes."""
        config: dict[str, Any] = resolve_model_data_config(model)
        channels, *default = config["input_size"]
        embed: Any = getattr(model, "patch_embed", None)
        height, width = to_2tuple(getattr(embed, "img_size", None) or tuple(default))
        channels = int(getattr(model, "in_chans", channels))
        return cls(
            input_size=(channels, height, width), mean=tuple(config["mean"])[:channels],
            std=tuple(config["std"])[:channels], interpolation=config["interpolation"], crop_pct=config["crop_pct"],
            class_names=_class_names(int(getattr(model, "num_classes", 0))),
        )  # fmt: skip

    def metadata(self, dtype: str) -> str:
        """The entry of a file's metadata, for a model that computes in `dtype`."""
        return json.dumps({"preprocessing": asdict(self), "dtype": dtype})


def read_entry(text: str) -> tuple[Preprocessing, str]:
    """The preprocessing and the dtype in an entry. Raises ValueError if it is damaged."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    return decode(Preprocessing, document.get("preprocessing"), "preprocessing"), str(document.get("dtype"))


def _class_names(count: int) -> tuple[str, ...]:
    """The names of ImageNet's classes, or of a larger set of them, if there are so many; else none."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return ()
    names = ImageNetInfo(subset)
    return tuple(str(names.index_to_description(index)) for index in range(count))
