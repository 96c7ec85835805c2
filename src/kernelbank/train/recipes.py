"""The recipes by name with their sources, and the settings that the paper states. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from kernelbank.errors import InputError
from kernelbank.text import suggest
from kernelbank.train.recipe import Recipe

RANDAUGMENT = "rand-m9-mstd0.5-inc1"
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5  # of random resized crops, timm's and torchvision's defaults


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """A recipe with its source, the hardware and the time of its training, and the published result."""

    recipe: Recipe
    source: str
    hardware: str
    time: str
    result: str
    note: str = ""


def deit() -> PublishedRecipe:
    """DeiT, as trained by its authors."""
    recipe = Recipe(
        epochs=300, batch_size=1024, lr=5e-4, lr_batch=512, weight_decay=0.05,
        schedule="late", warmup_epochs=5, warmup_lr=1e-6, warmup_prefix=False, min_lr=1e-5,
        drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0, ema=0.99996, repeats=3,
        auto_augment=RANDAUGMENT, color_jitter=0.3, erase=0.25, scale=SCALE, ratio=RATIO, flip=FLIP,
    )  # fmt: skip
    return PublishedRecipe(
        recipe=recipe,
        source="facebookresearch/deit 7e160fe, main.py (arXiv 2012.12877)",
        hardware="4 GPUs with 256 images each for DeiT-Ti and DeiT-S; 2 nodes of 8 for DeiT-B (README_deit.md)",
        time="not stated in the repository",
        result="ImageNet-1K top-1: DeiT-Ti 72.2, DeiT-S 79.9, DeiT-B 81.8 (README_deit.md)",
        note="its script steps the schedule with the epoch just finished, so an epoch trains at the rate of the one "
        "before (schedule=late); timm leaves colour jitter out beside RandAugment",
    )


def deit_mm() -> PublishedRecipe:
    """DeiT-S and DeiT-Ti, as trained by MMClassification, the code base of the paper."""
    base = deit().recipe
    recipe = replace(
        base, lr=1e-3, lr_batch=1024, schedule="mixed", warmup_epochs=20, warmup_prefix=True, clip_grad=5.0,
        drop_path=0.0, ema=None, repeats=1, color_jitter=None,
    )  # fmt: skip
    return PublishedRecipe(
        recipe=recipe,
        source="open-mmlab/mmpretrain ee7f2e8, configs/deit/deit-small_4xb256_in1k.py and its _base_ files",
        hardware="4 GPUs with 256 images each (the file's name)",
        time="not stated",
        result="ImageNet-1K top-1: DeiT-Ti 74.50, DeiT-S 80.69 (configs/deit/README.md)",
        note="no drop path and no EMA for Ti and S, unlike DeiT; its RandAugment and erasing are ports of timm's, "
        "which run here; it mixes every batch by Mixup or CutMix with equal chance, as mixup_switch_prob=0.5 does; it "
        "keeps the last batch of an epoch, which Mixup in pairs does not allow",
    )


def swin() -> PublishedRecipe:
    """Swin, as trained by its authors, with the drop path rate of Swin-T."""
    recipe = Recipe(
        epochs=300, batch_size=1024, lr=5e-4, lr_batch=512, lr_rule="linear_all", weight_decay=0.05,
        schedule="step", warmup_epochs=20, warmup_lr=5e-7, warmup_prefix=True, min_lr=5e-6, clip_grad=5.0,
        drop_path=0.2, label_smoothing=0.1, mixup=0.8, cutmix=1.0,
        auto_augment=RANDAUGMENT, color_jitter=0.4, erase=0.25, scale=SCALE, ratio=RATIO, flip=FLIP,
    )  # fmt: skip
    return PublishedRecipe(
        recipe=recipe,
        source="microsoft/Swin-Transformer f82860b, config.py and configs/swin (arXiv 2103.14030)",
        hardware="8 GPUs with 128 images each (Swin-B: 64, two accumulation steps; get_started.md)",
        time="not stated in the repository",
        result="ImageNet-1K top-1: Swin-T 81.2, Swin-S 83.2, Swin-B 83.5 (get_started.md)",
        note="drop_path is 0.2 for Swin-T, 0.3 for Swin-S, 0.5 for Swin-B; DWNet (ce7c0b7) uses the same settings",
    )


def paper() -> PublishedRecipe:
    """The settings that the paper states for its ViT experiments; all others are DeiT's, since the paper follows its
    training strategy."""
    return PublishedRecipe(
        recipe=replace(deit().recipe, lr=1e-3, lr_batch=1024),
        source="arXiv 2309.10713, section 5.1; what it leaves open is from deit",
        hardware="not stated",
        time="not stated",
        result="not known: the paper's tables are not available to us",
        note="`kernelbank train --recipe paper --show` prints it beside the paper's statements",
    )


def paper_swin() -> PublishedRecipe:
    """The settings that the paper states for its Swin experiments: those of the Swin authors."""
    return replace(
        paper(),
        recipe=swin().recipe,
        source="arXiv 2309.10713, section 5.1: Swin with its original settings, which are swin's",
        note="",
    )


def finetune() -> PublishedRecipe:
    """Fine-tuning of pretrained weights, with a new head or another mixer."""
    recipe = Recipe(
        epochs=30, batch_size=512, lr=2.5e-4, lr_batch=512, weight_decay=0.05, schedule="step",
        warmup_epochs=5, warmup_lr=2.5e-7, min_lr=1e-6, layer_decay=0.75, clip_grad=1.0,
        drop_path=0.1, label_smoothing=0.1, temperature_epochs=0,
        auto_augment=RANDAUGMENT, erase=0.25, scale=SCALE, ratio=RATIO, flip=FLIP,
    )  # fmt: skip
    return PublishedRecipe(
        recipe=recipe,
        source="ours: AdamW with layer-wise decay of the rate (BEiT, arXiv 2106.08254), Swin's warm-up and length",
        hardware="any",
        time="a tenth of a training from scratch",
        result="none: it depends on the weights it starts from",
    )


def cifar10() -> PublishedRecipe:
    """Images of 32 x 32 pixels on one CPU or one small GPU."""
    recipe = Recipe(
        epochs=30, batch_size=128, lr=1e-3, lr_batch=128, weight_decay=0.05, warmup_epochs=3, warmup_lr=1e-5,
        clip_grad=1.0, label_smoothing=0.1, drop_path=0.05, scale=(0.5, 1.0), ratio=RATIO, flip=FLIP,
        crop_pct=1.0, temperature_epochs=3,
    )  # fmt: skip
    return PublishedRecipe(
        recipe=recipe,
        source="ours: DeiT's optimiser, milder crops, no mixing, for 45,000 small images",
        hardware="two CPU cores or one GPU",
        time="minutes to hours, by model; a run's log holds its own",
        result="none published; a run's record holds its own",
    )


def digits() -> PublishedRecipe:
    """scikit-learn's digits, which are part of the package: the recipe of the studies."""
    return PublishedRecipe(
        recipe=digits_recipe(),
        source="ours: DeiT's optimiser (AdamW, weight decay 0.05, cosine), a larger rate, small batches, 1,077 images",
        hardware="one thread of any CPU",
        time="seconds",
        result="the records of the studies hold what it reaches",
    )


DIGITS_EPOCHS = 12


def digits_recipe(epochs: int = DIGITS_EPOCHS) -> Recipe:
    """Return the recipe `digits` for any number of epochs. The warm-up takes two epochs if there are at least three."""
    recipe = Recipe(
        epochs=DIGITS_EPOCHS, batch_size=48, lr=4e-3, lr_batch=48, lr_rule="fixed", weight_decay=0.05, drop_last=False,
        warmup_epochs=2, warmup_lr=4e-5, clip_grad=1.0, temperature_epochs=0,
    )  # fmt: skip
    return with_epochs(recipe, epochs)


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Return `recipe` for another number of epochs. A warm-up that does not fit is scaled, rounded up, and leaves at
    least one epoch after it. Raises InputError for a number below 1."""
    warmup = recipe.warmup_epochs
    if warmup >= epochs >= 1:
        warmup = min(math.ceil(warmup * epochs / recipe.epochs), epochs - 1)
    return replace(recipe, epochs=epochs, warmup_epochs=warmup)


RECIPES: dict[str, Callable[[], PublishedRecipe]] = {
    "deit": deit, "deit_mm": deit_mm, "swin": swin, "paper": paper, "paper_swin": paper_swin,
    "finetune": finetune, "cifar10": cifar10, "digits": digits,
}  # fmt: skip


def published(name: str) -> PublishedRecipe:
    """Return the recipe `name`. Raises InputError if it is unknown."""
    if name not in RECIPES:
        raise InputError(
            f"recipe: unknown recipe {name!r}{suggest(name, RECIPES)}; expected one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]()


# ---- beside the paper ----------------------------------------------------------------------------------------

# field -> what section 5.1 says on it; in the paper's words where there are any
STATED: dict[str, str] = {
    "epochs": "300 epochs",
    "batch_size": "batch 1024",
    "lr": "learning rate 0.001",
    "lr_batch": "learning rate 0.001 with batch 1024",
    "optimiser": "AdamW",
    "schedule": "cosine; when the rate moves: not stated, taken from deit",
    "scale": "random resized crop to 224; the range: not stated, taken from deit",
    "flip": "horizontal flip; the share: not stated, taken from deit",
    "erase": "random erasing; the share: not stated, taken from deit",
    "mixup": "Mixup; its alpha: not stated, taken from deit",
    "cutmix": "CutMix; its alpha: not stated, taken from deit",
    "drop_path": "stochastic depth; the rate: not stated, taken from deit",
    "repeats": "repeated augmentation; how often: not stated, taken from deit",
    "ema": "EMA; the decay: not stated, taken from deit",
}
_STATED_SWIN = "original settings of Swin"
_OURS = "ours; no effect without a predict(softmax) mixer"


def with_origins(name: str, recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield (field, value, origin) for every field of `recipe`, which is the recipe `name` with overridden fields.

    The origin is that the field was overridden, the statement of the paper, or the source of the value.
    """
    default = published(name)
    for field in fields(Recipe):
        value, as_published = getattr(recipe, field.name), getattr(default.recipe, field.name)
        origin = _origin(name, field.name, default)
        yield (
            field.name,
            shown(value),
            f"overridden; {name} has {shown(as_published)}" if value != as_published else origin,
        )
    rates = recipe.rates
    yield "rate at this batch", f"{rates.top:g}", f"lr, from {rates.warmup:g}, down to {rates.end:g}"


def _origin(name: str, field: str, default: PublishedRecipe) -> str:
    if field.startswith("temperature"):
        return "Dynamic Convolution's (arXiv 1912.03458); " + _OURS
    match name:
        case "paper":
            return STATED.get(field, "not stated: taken from deit")
        case "paper_swin":
            return _STATED_SWIN
        case _:
            return default.source


def shown(value: object) -> str:
    """Return a value of a recipe as a short text."""
    if isinstance(value, tuple):
        return " ".join(shown(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
