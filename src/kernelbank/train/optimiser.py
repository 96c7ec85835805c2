"""Build timm's optimiser and scheduler from a recipe."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from kernelbank.errors import InputError
from kernelbank.train.recipe import Recipe


def build_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimiser, with parameter groups with and without weight decay (see `model.no_weight_decay()`), and
    per layer with `layer_decay`, which needs `group_matcher` of the model. Raises InputError if it has none."""
    if recipe.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise InputError(
            f"recipe: invalid layer_decay={recipe.layer_decay} for a model without group_matcher; expected None"
        )
    arguments: dict[str, dict[str, Any]] = {
        "adamw": {"betas": recipe.betas, "eps": recipe.eps},
        "sgd": {"momentum": recipe.betas[0]},
    }
    return create_optimizer_v2(
        model, opt=recipe.optimiser, lr=recipe.rates.top, weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay, **arguments[recipe.optimiser],
    )  # fmt: skip


def build_scheduler(optimiser: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Return the scheduler, a linear warm-up and a cosine in updates. `Recipe.schedule_at` gives its argument."""
    decaying = recipe.epochs - (recipe.warmup_epochs if recipe.warmup_prefix else 0)
    return CosineLRScheduler(
        optimiser,
        t_initial=decaying * steps,
        lr_min=recipe.rates.end,
        warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.rates.warmup,
        warmup_prefix=recipe.warmup_prefix,
    )
