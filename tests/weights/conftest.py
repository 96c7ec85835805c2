"""Small random models of timm's for every test of conversion."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
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
    }


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
