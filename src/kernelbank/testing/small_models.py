"""A small model of every row of the atlas in both trunks, in which every tensor changes the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kernelbank.nn.backbone import Backbone, HierarchicalBackbone, PlainBackbone
from kernelbank.spec import Dilated, MixerSpec, Neighborhood, Window

IMAGE = (3, 32, 32)
"""The channels, height and width of the images."""

# 32 channels divide the groups of every row; static kernels do not mix the class token with the grid
_PLAIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5,
    "global_pool": "avg",
}  # fmt: skip
_STAGES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3,
    "num_classes": 5,
}  # fmt: skip
TRUNKS = ("plain", "hierarchical")


def small_model(trunk: str, row: str, std: float = 0.1, **arguments: Any) -> Backbone:
    """A model of two blocks of 64 channels on 4 x 4 patches (``plain``), or of two stages of 32 and 64 channels on 8 x
    8 and 4 x 4 patches (``hierarchical``), with `row` as its mixer, in eval mode.

    Windows and neighbourhoods are 3 x 3, so that they do not fill the grid, and the second block shifts windows that
    alternate. Every parameter is drawn from a normal distribution of deviation `std`, norms and biases too.
    `arguments` are those of the backbone.
    """
    spec = MixerSpec.parse(row)
    if isinstance(spec.support, Window | Neighborhood | Dilated):
        spec = replace(spec, support=replace(spec.support, M=3))
    if trunk == "plain":
        model: Backbone = PlainBackbone(mixer=str(spec), **(_PLAIN | arguments))
    else:
        model = HierarchicalBackbone(mixer=str(spec), **(_STAGES | arguments))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.eval()
    return model
