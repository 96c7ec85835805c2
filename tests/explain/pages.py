"""Pages of single mixers and of small models, for the tests."""

from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kernelbank.explanation.capture import explain
from kernelbank.explanation.page import Column, Shown, render
from kernelbank.explanation.picture import Picture
from kernelbank.explanation.statistics import statistics
from kernelbank.explanation.subject import prefix_names


def picture(side: int = 32, name: str = "a.png") -> Picture:
    """A picture of noise."""
    pixels = np.random.RandomState(len(name)).randint(0, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(pixels)
    return Picture(name, image, ("said about it",), image)


def column(model: nn.Module, *inputs: Tensor, label: str = "model", **asked: object) -> Column:
    """A model on pictures of noise, which stand for `inputs`."""
    shown = []
    for index, x in enumerate(inputs):
        explanation = explain(model, x, **asked)  # type: ignore[arg-type]
        classes = [("first <b>class</b>", 0.75), ("second", 0.25)]
        shown.append(Shown(picture(name=f"{index}.png"), explanation.layers, statistics(explanation), classes))
    return Column(label, "random weights", shown, prefix_names(model) or ("class",))


def texts(html: str) -> dict[str, str]:
    """The texts of the page's data elements by id."""
    return dict(re.findall(r'<script id="(\w+)" type="[^"]+">(.*?)</script>', html, re.DOTALL))


def noise(*shape: int, seed: int = 3) -> Tensor:
    """Random images."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


__all__ = ["column", "noise", "picture", "render", "texts"]
