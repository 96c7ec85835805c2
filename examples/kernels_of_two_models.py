"""Compare which kernels a model selects with softmax and with ReLU, on a photograph that scikit-learn ships.

    python examples/kernels_of_two_models.py [MODEL]

MODEL is a ViT of timm, by default one with random weights of test size; `--pretrained` behind it fetches its weights.
`kernelbank explain` draws the same as a page.
"""

from __future__ import annotations

import sys
from itertools import groupby
from statistics import fmean

import timm
import torch
from sklearn.datasets import load_sample_image
from torch import nn

import kernelbank
from kernelbank.explanation.statistics import TITLES, statistics

NAMES = ("effective", "sparsity", "distance")


def photograph(side: int) -> torch.Tensor:
    """The photograph of a flower as a normalised batch of one image, (1, 3, side, side)."""
    image = torch.tensor(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    return (nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True) - 0.5) / 0.5


def main(name: str = "test_vit", *options: str) -> None:
    """Print statistics of the selected kernels by layer, as means over heads."""
    for cell in (None, "activation=relu,count"):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained="--pretrained" in options).eval()
        side = model.pretrained_cfg["input_size"][-1]
        if cell is not None:
            kernelbank.replace_mixers(model, cell)
        print(f"\n{name} with {cell or 'its own attention'}")
        print(f"{'layer':<16}" + "".join(f"{TITLES[title]:>18}" for title in NAMES))
        found = statistics(kernelbank.explain(model, photograph(side)))
        for layer, heads in groupby(found, lambda head: head.layer):
            of_heads = list(heads)
            means = [fmean(getattr(head, title) for head in of_heads) for title in NAMES]
            print(f"{layer:<16}" + "".join(f"{mean:>18.2f}" for mean in means))


if __name__ == "__main__":
    main(*sys.argv[1:])
