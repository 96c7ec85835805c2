"""Designs: the hosts, rows, seeds, data and recipe of a study. Imports no torch.

`digits` is the default of ``kernelbank study NAME``. `cifar10` tests the claims on natural images, and `cifar10-short`
is a part of it that takes half an hour on two CPU cores. A command without a design must state hosts, data and recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kernelbank.errors import InputError
from kernelbank.text import suggest


@dataclass(frozen=True, kw_only=True)
class Design:
    """The defaults of a study's options.

    Args:
        what: A description in one sentence.
        hosts: The host models, each with the cells that are changed in its mixers before those of a row.
        rows: The labels of the rows, by study; a study that is not listed has all of its rows.
        seeds: The seeds of every row.
        recipe: The name of the recipe.
        changes: The fields of the recipe that differ.
        data: The data set, or None if it must be given as an option.
        train_images: The number of training images; None for all.
    """

    what: str
    hosts: Mapping[str, str]
    seeds: tuple[int, ...]
    recipe: str
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    train_images: int | None = None


_DIGITS_HOSTS = MappingProxyType({"plain": "", "hierarchical": "support=window(2, alternate)"})
_ROLES = (
    "softmax", "identity", "relu", "exp", "sigmoid", "batchnorm", "center", "layernorm", "l1", "softmax-positions",
    "center-relu", "relu-l1",
)  # fmt: skip
_OTHER_PIPELINES = (
    "identity-raw", "relu-raw", "exp-raw", "center-exp", "batchnorm-relu", "batchnorm-exp", "center-batchnorm",
    "rmsnorm-positions", "layernorm-relu", "layernorm-exp", "softmax-absolute", "relu-absolute", "layernorm-absolute",
)  # fmt: skip
_SCALES = (
    "softmax", "softmax-cold", "softmax-warm", "relu-n", "relu-sqrt-n", "relu-raw", "layernorm-n", "layernorm-sqrt-n",
    "layernorm-raw", "layernorm-positions",
)  # fmt: skip
_METHODS = ("softmax", "swin", "linformer", "nat", "dconv", "static", "image", "position-heads", "bank")
_SOURCES = ("softmax", "dconv", "static", "image", "position-heads", "bank")
_TEMPERATURES = ("softmax", "softmax-colder", "softmax-cold", "softmax-warm", "softmax-warmer")

_CIFAR10_HOSTS = MappingProxyType({"plain32": "", "hierarchical32": ""})

DESIGNS: Mapping[str, Design] = MappingProxyType({
    "digits": Design(
        what="demonstrations on 8 x 8 images of digits: five minutes on two CPU cores",
        hosts=_DIGITS_HOSTS, seeds=(0, 1, 2), recipe="digits", data="digits",
        rows={"softmax": _ROLES, "assumptions": _SCALES, "kernels": _METHODS},
    ),
    "quick": Design(
        what="four rows, two seeds, eight epochs of digits: less than a minute",
        hosts=_DIGITS_HOSTS, seeds=(0, 1), recipe="digits", changes={"epochs": 8}, data="digits",
        rows={
            "softmax": ("softmax", "identity", "relu", "layernorm"),
            "depthwise": ("softmax", "dwsa", "gate", "position"),
            "assumptions": ("softmax", "relu-n", "relu-raw", "layernorm-n"),
            "kernels": ("softmax", "static", "image", "bank"),
            "future": ("softmax", "softmax-3", "no-mlp", "memory"),
            "swap": ("softmax", "relu", "relu-1", "relu-5"),
        },
    ),
    "cifar10": Design(
        what="the claims on 45,000 natural images of 32 x 32 pixels, in a plain and a hierarchical model",
        hosts=_CIFAR10_HOSTS, seeds=(0, 1, 2, 3, 4), recipe="cifar10",
        rows={"softmax": (*_ROLES, *_OTHER_PIPELINES), "assumptions": _TEMPERATURES},
    ),
    "cifar10-short": Design(
        what="the rows of the main claims on 12,000 of these images, in the plain model, for a few epochs",
        hosts={"plain32": ""}, seeds=(0, 1, 2), recipe="cifar10", train_images=12_000,
        changes={"epochs": 8, "warmup_epochs": 1, "drop_path": 0.0},
        rows={
            "softmax": ("softmax", "identity", "relu", "layernorm"),
            "depthwise": ("softmax", "dwsa", "gate"),
            "assumptions": _TEMPERATURES,
            "kernels": _SOURCES,
            "future": ("softmax", "softmax-3", "strided", "no-mlp", "memory"),
            "swap": ("softmax", "relu", "relu-1", "relu-5", "layernorm", "layernorm-1", "layernorm-5"),
        },
    ),
})  # fmt: skip
"""The designs by name.

The real-data design compares, in each host: pipelines with and without a role (study softmax, C1 and C2), ReLU and
LayerNorm with softmax by epochs to a validation target, by area under the curve and by accuracy (C3, C4), the same
with the positions of the trunk alone (C8), depth-wise self-attention and its terms with softmax attention (study
depthwise, C5 and C6), and temperatures (study assumptions, C7). Rows are paired by seed; the test split is read once
per run. The target of C3 comes from softmax runs with seeds of their own (``--rows softmax --seeds 100 101 102``), and
learning rates are compared on validation with one more seed (``--lr``, ``--seeds 200``): records of all of them lie in
one folder. Whether a difference is one of scale, the rows of study softmax with a post-scale show: ``--rows softmax
relu-scaled ...``.
"""


def find_design(name: str) -> Design:
    """Return the design `name`. Raises InputError if it is unknown."""
    if name not in DESIGNS:
        raise InputError(
            f"design: unknown design {name!r}{suggest(name, DESIGNS)}; expected one of {', '.join(DESIGNS)}"
        )
    return DESIGNS[name]
