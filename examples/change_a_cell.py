"""Train a small stock ViT of timm on scikit-learn's digits, once for each activation in the place of softmax.

    python examples/change_a_cell.py

Takes half a minute on two CPU cores and prints a table. One seed and 397 test images show how it is done; which
activation is better is a question for `kernelbank study`.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import kernelbank

ACTIVATIONS = ("softmax", "relu,count", "layernorm,count", "identity,count")
EPOCHS = 10


def build(activation: str) -> nn.Module:
    """A ViT of two blocks for 8 x 8 images, with `activation` in every block."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4
    )
    return kernelbank.replace_mixers(model, f"activation={activation}")


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Train with AdamW for `EPOCHS` epochs in batches of 100."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(100):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def main() -> None:
    """Train one model per activation and print its test accuracy."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    print(f"{'activation':<16} {'test top-1':>10}")
    for activation in ACTIVATIONS:
        model = build(activation)
        train(model, images[:1400], labels[:1400])
        with torch.no_grad():
            right = model.eval()(images[1400:]).argmax(1) == labels[1400:]
        print(f"{activation:<16} {100 * right.float().mean().item():>8.1f} %")


if __name__ == "__main__":
    main()
