"""Small random models of timm's for every test of conversion."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tiny_models import PLAIN, STAGES, drawn


@pytest.fixture(scope="session")
def drawn_models() -> dict[str, Any]:
    """One of each family with a head, without one, and what only some dialects have."""
    return {
        "vit": drawn(VisionTransformer(**PLAIN)),
        "swin": drawn(SwinTransformer(**STAGES)),
        "vit headless": drawn(VisionTransformer(**PLAIN | {"num_classes": 0})),
        "swin headless": drawn(SwinTransformer(**STAGES | {"num_classes": 0})),
        "vit scaled": drawn(VisionTransformer(**PLAIN, init_values=0.1)),
        "vit scaled headless": drawn(VisionTransformer(**PLAIN | {"num_classes": 0}, init_values=0.1)),
        "vit registers": registers({}),
        "vit registers headless": registers({"num_classes": 0}),
        "vit pre_norm": unbiased_head(drawn(VisionTransformer(**PLAIN, pre_norm=True))),
        "vit pre_norm headless": drawn(VisionTransformer(**PLAIN | {"num_classes": 0}, pre_norm=True)),
        "vit tokens headless": drawn(VisionTransformer(
            **PLAIN | {"num_classes": 0}, class_token=False, global_pool="", fc_norm=False)),
    }  # fmt: skip


def registers(more: dict[str, Any]) -> Any:
    """DINOv2's: LayerScale, and registers without position embeddings."""
    model = drawn(VisionTransformer(**PLAIN | more, init_values=0.1, reg_tokens=2))
    with torch.no_grad():
        model.pos_embed[:, 1:3] = 0
    return model


def unbiased_head(model: Any) -> Any:
    """CLIP's projection has no bias."""
    with torch.no_grad():
        model.head.bias.zero_()
    return model


class Own(dict[str, Any]):
    """A test's own copies."""

    def __missing__(self, name: str) -> Any:
        self[name] = deepcopy(self.drawn[name])
        return self[name]

    def __init__(self, drawn: dict[str, Any]) -> None:
        super().__init__()
        self.drawn = drawn


@pytest.fixture
def models(drawn_models: dict[str, Any]) -> dict[str, Any]:
    """`drawn_models`, copied as they are asked for."""
    return Own(drawn_models)
