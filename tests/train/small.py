"""A model, data and a recipe so small that a run takes less than a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kernelbank.data.dataset import Dataset, TensorSplit
from kernelbank.nn.build import build_backbone
from kernelbank.train.recipe import Recipe
from kernelbank.zoo import SMALL

RECIPE = Recipe(epochs=5, batch_size=16, lr=4e-3, lr_batch=16, weight_decay=0.05, warmup_epochs=1, clip_grad=1.0,
                label_smoothing=0.1, shift=1)  # fmt: skip


def tiny_data(train: int = 160, val: int = 37, dtype: torch.dtype = torch.float32) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        labels = torch.arange(count) % 7
        images = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype) + labels.view(-1, 1, 1, 1) / 3
        return TensorSplit(images, labels)

    return Dataset("tiny", "none", split(train), split(val), split(9), num_classes=7, in_chans=1, img_size=(8, 8))


def tiny_model(mixer: str = "vit", **arguments: Any) -> nn.Module:
    plain = SMALL["plain"]
    trunk = replace(plain.trunk, embed_dim=16, num_heads=2, depth=2)
    spec = replace(plain, trunk=trunk, mixer=mixer, num_classes=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_backbone(spec, **arguments)
