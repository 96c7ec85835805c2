"""The recipes: every field against the tables of what was published, and the rules that they follow."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from kernelbank.errors import InputError
from kernelbank.train.optimiser import build_optimiser, build_scheduler
from kernelbank.train.recipe import Recipe, stated
from kernelbank.train.recipes import RECIPES, STATED, published, with_origins

# What the repositories say, field by field: facebookresearch/deit 7e160fe main.py, microsoft/Swin-Transformer f82860b
# config.py with swin_tiny's yaml, open-mmlab/mmpretrain ee7f2e8 configs/deit/deit-small_4xb256_in1k.py and its bases.
# Fields that differ between them first, then those they share. Temperature, crop_pct: ours and the eval protocol.
TABLE = {
    # field: (deit, deit_mm, swin)
    "lr": (5e-4, 1e-3, 5e-4),
    "lr_batch": (512, 1024, 512),
    "lr_rule": ("linear", "linear", "linear_all"),
    "schedule": ("late", "mixed", "step"),
    "warmup_epochs": (5, 20, 20),
    "warmup_lr": (1e-6, 1e-6, 5e-7),
    "warmup_prefix": (False, True, True),
    "min_lr": (1e-5, 1e-5, 5e-6),
    "clip_grad": (None, 5.0, 5.0),
    "color_jitter": (0.3, None, 0.4),
    "repeats": (3, 1, 1),
    "ema": (0.99996, None, None),
    "drop_path": (0.1, 0.0, 0.2),
}
SHARED = {
    "epochs": 300, "batch_size": 1024, "optimiser": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05,
    "layer_decay": None, "drop_last": True, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "crop_pct": 0.875, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic", "erase": 0.25, "erase_mode": "pixel",
    "shift": 0, "temperature": 30.0, "temperature_epochs": 10,
}  # fmt: skip


@pytest.mark.parametrize("index, name", list(enumerate(["deit", "deit_mm", "swin"])))
def test_every_field_is_the_published_one(index: int, name: str) -> None:
    recipe = published(name).recipe
    expected = {field: values[index] for field, values in TABLE.items()} | SHARED
    assert {field.name: getattr(recipe, field.name) for field in fields(Recipe)} == expected
    assert recipe.rates.top == 1e-3  # 5e-4 * 1024 / 512 in all three


def test_rates_follow_the_stated_rule() -> None:
    swin, deit = published("swin").recipe, published("deit").recipe
    assert (swin.rates.warmup, swin.rates.end) == (1e-6, 1e-5)  # Swin scales them too
    assert (deit.rates.warmup, deit.rates.end) == (1e-6, 1e-5)  # DeiT does not
    assert replace(deit, batch_size=256).rates.top == 2.5e-4 and replace(deit, batch_size=256).rates.end == 1e-5
    assert replace(swin, batch_size=256).rates.end == 2.5e-6
    assert replace(deit, batch_size=256, lr_rule="fixed").rates.top == 5e-4


def test_the_paper_is_what_it_states_and_deit_for_the_rest() -> None:
    paper, deit = published("paper").recipe, published("deit").recipe
    assert (paper.lr, paper.lr_batch, paper.epochs, paper.batch_size, paper.optimiser) == (
        1e-3,
        1024,
        300,
        1024,
        "adamw",
    )
    assert replace(paper, lr=deit.lr, lr_batch=deit.lr_batch) == deit and paper.rates == deit.rates
    assert paper.mixup and paper.cutmix and paper.erase and paper.drop_path and paper.repeats > 1 and paper.ema
    assert published("paper_swin").recipe == published("swin").recipe
    rows = {field: (value, origin) for field, value, origin in with_origins("paper", paper)}
    assert set(STATED) <= set(rows) and rows["lr"] == ("0.001", "learning rate 0.001")
    assert rows["warmup_epochs"] == ("5", "not stated: taken from deit")
    assert rows["clip_grad"] == ("None", "not stated: taken from deit")
    changed = dict((field, origin) for field, _, origin in with_origins("paper", replace(paper, batch_size=256)))
    assert changed["batch_size"] == "overridden; paper has 1024"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_states_where_it_comes_from(name: str) -> None:
    found = published(name)
    assert all((found.source, found.hardware, found.time, found.result)) and RECIPES[name].__doc__
    assert {field for field, _, _ in with_origins(name, found.recipe)} >= {field.name for field in fields(Recipe)}


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="unknown recipe 'diet'; did you mean 'deit'"):
        published("diet")


def rates_of(recipe: Recipe, steps: int) -> list[float]:
    optimiser = build_optimiser(torch.nn.Linear(2, 2), recipe)
    scheduler, rates = build_scheduler(optimiser, recipe, steps), []
    for epoch in range(recipe.epochs):
        for step in range(steps):
            scheduler.step(recipe.schedule_at(epoch, step, steps))
            rates.append(optimiser.param_groups[0]["lr"])
    return rates


def test_schedules_move_when_the_authors_scripts_move_them() -> None:
    base = Recipe(epochs=10, batch_size=512, lr=1.0, weight_decay=0.0, warmup_epochs=2, warmup_lr=0.0, min_lr=0.1)
    by_step = rates_of(base, 4)
    assert by_step[:9] == pytest.approx([step / 8 for step in range(8)] + [1.0]) and len(set(by_step)) == 40
    by_epoch = rates_of(replace(base, schedule="epoch"), 4)
    assert by_epoch == [rate for epoch in range(10) for rate in [by_step[4 * epoch]] * 4]
    late = rates_of(replace(base, schedule="late"), 4)
    assert late == by_epoch[:4] + by_epoch[:-4]  # DeiT: the first two epochs at the first rate
    assert rates_of(replace(base, schedule="mixed"), 4) == by_step[:8] + by_epoch[8:]
    hidden = rates_of(replace(base, warmup_prefix=False), 4)
    assert hidden[8] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 8 / 40)))  # the cosine runs since epoch 0


def test_the_temperature_anneals_by_epoch() -> None:
    recipe = published("deit").recipe
    assert [recipe.temperature_at(epoch, 1.0) for epoch in (0, 5, 10, 299)] == [30.0, 15.5, None, None]
    assert replace(recipe, temperature_epochs=0).temperature_at(0, 1.0) is None


def test_mixing_needs_whole_even_batches() -> None:
    with pytest.raises(InputError, match="images are mixed in pairs"):
        replace(published("deit").recipe, batch_size=511)
    with pytest.raises(InputError, match="drop_last=False"):
        replace(published("deit").recipe, drop_last=False)


def test_only_what_is_stated_is_shown() -> None:
    shown = stated({"epochs": 3, "lr": 0.1, "betas": [0.9, 0.999], "ema": 0.9, "from_another_version": 1})
    assert shown == {"epochs": 3, "lr": 0.1, "ema": 0.9, "from_another_version": 1}
