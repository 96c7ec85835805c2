"""Arguments of small timm models, and weights that make outputs depend on every tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 5,
}  # fmt: skip
STAGES: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2, 1, 1), "num_heads": (2, 4, 4, 4),
    "window_size": 2, "num_classes": 5,
}  # fmt: skip


def drawn(model: nn.Module, std: float = 0.2) -> Any:
    """`model` in eval mode with every parameter drawn anew, norms and biases too."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return model.eval()
