"""The training loop: a function of (model, data, recipe, seed), bit-exact across an interruption."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from kernelbank.data.dataset import Dataset, Split
from kernelbank.records import EpochResult
from kernelbank.train import checkpoint as checkpoints
from kernelbank.train.recipe import Recipe


class DivergedError(RuntimeError):
    """A loss that is not finite: the message names the epoch, the step and the learning rate."""


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy without label smoothing, and top-1 in per cent."""

    loss: float
    top1: float


@dataclass(frozen=True)
class History:
    """The epochs of a run, those before an interruption included."""

    epochs: tuple[EpochResult, ...]


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochResult, bool], None] | None = None,
) -> History:
    """Train `model` in place and return its curves. Raises DivergedError when a loss is not finite.

    Order, shifts and drop path of an epoch follow from (seed, epoch) alone, so a run that goes on from
    `checkpoint` ends bit-identical to one that was never interrupted. `on_epoch` is told every epoch, those read
    from the checkpoint first, and whether it was read.
    """
    steps = math.ceil(len(data.train) / recipe.batch_size)
    optimiser, scheduler = _optimiser(model, recipe, steps)
    parts: dict[str, checkpoints.Stateful] = {"model": model, "optimiser": optimiser, "scheduler": scheduler}
    owner = checkpoints.owner(model, recipe, seed)
    epochs = checkpoints.resume(checkpoint, owner, parts) if checkpoint else ()
    if on_epoch:
        for result in epochs:
            on_epoch(result, True)
    for epoch in range(len(epochs), recipe.epochs):
        start = perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, epoch, "noise"))
            train_loss = _train_epoch(model, data.train, recipe, optimiser, scheduler, seed=seed, epoch=epoch)
        after = evaluate(model, data.val.images, data.val.labels)
        if not math.isfinite(after.loss):
            raise DivergedError(f"validation loss {after.loss} after epoch {epoch + 1}")
        result = EpochResult(train_loss, after.loss, after.top1, perf_counter() - start)
        epochs = (*epochs, result)
        if checkpoint:
            checkpoints.save(checkpoint, owner, parts, epochs)
        if on_epoch:
            on_epoch(result, False)
    return History(epochs)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> Metrics:
    """Loss and top-1 of `model` in evaluation mode; the mode it had is restored."""
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        correct += int((logits.argmax(1) == y).sum())
    model.train(was_training)
    return Metrics(loss / len(labels), 100 * correct / len(labels))


def derive(seed: int, epoch: int, what: str) -> int:
    """A seed of its own for every (seed, epoch, purpose); neighbouring seeds share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{what}".encode()).digest()[:8], "big") >> 1


def _optimiser(model: nn.Module, recipe: Recipe, steps: int) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """timm's AdamW over two groups (with and without decay; `model.no_weight_decay()` is honoured), and a cosine
    to zero by optimiser step."""
    optimiser = create_optimizer_v2(model, opt=recipe.optimiser, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler = CosineLRScheduler(
        optimiser,
        t_initial=(recipe.epochs - recipe.warmup_epochs) * steps,
        warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.lr / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return optimiser, scheduler


def _train_epoch(
    model: nn.Module,
    split: Split,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    scheduler: CosineLRScheduler,
    *,
    seed: int,
    epoch: int,
) -> float:
    """One pass over `split`; the mean loss over its images. Raises DivergedError."""
    generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
    batches = torch.randperm(len(split), generator=generator).split(recipe.batch_size)
    images = shifted(split.images, recipe.shift, generator)
    model.train()
    total = 0.0
    for step, batch in enumerate(batches):
        scheduler.step_update(epoch * len(batches) + step)
        loss = F.cross_entropy(model(images[batch]), split.labels[batch], label_smoothing=recipe.label_smoothing)
        if not math.isfinite(loss.item()):
            lr = optimiser.param_groups[0]["lr"]
            raise DivergedError(f"training loss {loss.item()} at epoch {epoch + 1}, step {step + 1}, lr {lr:.3g}")
        optimiser.zero_grad()
        loss.backward()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimiser.step()
        total += loss.item() * len(batch)
    return total / len(split)


def shifted(images_NCHW: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Every image moved by -most..most pixels per axis, each drawn from `generator`; the edge is repeated."""
    if not most:
        return images_NCHW
    count, _, height, width = images_NCHW.shape
    padded = F.pad(images_NCHW, (most,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, count), generator=generator)
    rows = dy[:, None] + torch.arange(height)  # (N, H): the rows of the padded image that each image keeps
    columns = dx[:, None] + torch.arange(width)
    picked = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
