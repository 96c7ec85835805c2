"""Make the convolutions of a ConvNet dynamic, so that each image chooses among several kernels, and train it on digits.

    python examples/dynamic_convnet.py

The paper's table has two of these: D-Conv (full kernels, weighted per image) and D-DW-Conv (depth-wise ones).
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import kernelbank


def main() -> None:
    """Print the parameters and the test accuracy of a ResNet before and after the change."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    for spec in (None, "dconv"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        if spec is not None:
            kernelbank.dynamize(model, spec)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(3):
            for rows in torch.randperm(700).split(50):
                batch = nn.functional.interpolate(images[rows], scale_factor=2)
                loss = nn.functional.cross_entropy(model(batch), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        model.eval()
        with torch.no_grad():
            right = model(nn.functional.interpolate(images[1400:], scale_factor=2)).argmax(1) == labels[1400:]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{spec or 'static':<8} {parameters / 1e6:.2f} M parameters, {100 * right.float().mean().item():.1f} %")


if __name__ == "__main__":
    main()
