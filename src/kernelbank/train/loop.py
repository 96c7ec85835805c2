"""The training loop: a function of (model, data, recipe, seed). A resumed run has the same bits as one without
interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from kernelbank.data.dataset import UNREADABLE, Dataset, Split
from kernelbank.data.order import Update, derive, epoch_length, epoch_rows, in_order, updates
from kernelbank.errors import InputError
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.machine import unprobed
from kernelbank.records import EpochResult
from kernelbank.spec import Predict
from kernelbank.train import checkpoint as checkpoints
from kernelbank.train.checkpoint import Progress, State
from kernelbank.train.engine import Engine, deterministic, own_randomness, reseed
from kernelbank.train.optimiser import build_optimiser, build_scheduler
from kernelbank.train.recipe import Recipe

SYNC_EVERY = 20
"""The number of updates between reads of the losses, on GPUs and with several processes, where a read waits for
them."""


class DivergedError(RuntimeError):
    """A loss is not finite. The message has the epoch, the step and the learning rate; `last_good` is the last
    checkpoint before it, or None."""

    def __init__(self, message: str, last_good: Path | None) -> None:
        super().__init__(message)
        self.last_good = last_good


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and wrote its checkpoint. The message has its path."""


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy without label smoothing, and top-1 and top-5 in per cent, over `count` images. The
    `unreadable` images are not counted."""

    loss: float
    top1: float
    top5: float
    count: int
    unreadable: int = 0


@dataclass(frozen=True)
class History:
    """The epochs of a run, including those before an interruption."""

    epochs: tuple[EpochResult, ...]


@dataclass(frozen=True)
class StepReport:
    """The state of an epoch: `step` of `steps`, the mean loss so far, the learning rate, and the speed."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    engine: Engine | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochResult, bool], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> History:
    """Train `model` in place and return its curves.

    Images, augmentation, mixing and drop path of an update depend only on (seed, epoch, step, process), so that a run
    resumed from `checkpoint` has the same bits as one without interruption.

    Args:
        on_epoch: Called with every epoch, starting with those in the checkpoint, and whether it was read from there.
        on_step: Called with a report whenever the losses are read.
        stop: If it returns True, the run writes its checkpoint and raises `Stopped`.

    Raises:
        DivergedError: If a loss is not finite.
        InputError: If the batch is larger than the data or does not divide over the processes, or if the checkpoint
            belongs to another run.
        Stopped: See `stop`.
    """
    engine = engine or Engine()
    with own_randomness(), deterministic(engine.hardware.deterministic), unprobed():
        run = _Run(model, data, recipe, seed, engine, checkpoint)
        run.resume(on_epoch)
        for epoch in range(len(run.progress.epochs), recipe.epochs):
            run.train_epoch(epoch, on_step, stop)
            result = run.finish_epoch(epoch)
            if on_epoch:
                on_epoch(result, False)
            if stop and epoch + 1 < recipe.epochs:
                run.stop_if(bool(stop()))
        run.close()
    return History(run.progress.epochs)


class _Run:
    """The state and the steps of `train`."""

    def __init__(
        self, model: nn.Module, data: Dataset, recipe: Recipe, seed: int, engine: Engine, checkpoint: Path | None
    ) -> None:
        self.data, self.recipe, self.seed, self.engine, self.path = data, recipe, seed, engine, checkpoint
        self.micro = _micro_batch(recipe, engine)
        self.steps = epoch_length(len(data.train), recipe.repeats, recipe.batch_size, recipe.drop_last)
        if not self.steps:
            raise InputError(
                f"recipe: invalid batch_size={recipe.batch_size} for {len(data.train)} training images; expected at "
                "most their number"
            )
        self.owner = checkpoints.owner(model, recipe, seed)
        self.model, plain, ema = engine.prepare(model, recipe.ema)
        self.dtype = next(plain.parameters()).dtype
        self.optimiser = build_optimiser(plain, recipe)
        self.scheduler = build_scheduler(self.optimiser, recipe, self.steps)
        self.state = State(plain, self.optimiser, ema, Progress())
        self.mixup = _mixup(recipe, data.num_classes)
        self.sync_every = 1 if engine.device.type == "cpu" and engine.part.world == 1 else SYNC_EVERY

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def resume(self, on_epoch: Callable[[EpochResult, bool], None] | None) -> None:
        if self.path and checkpoints.resume(self.path, self.owner, self.state, self.engine) and on_epoch:
            for result in self.progress.epochs:
                on_epoch(result, True)

    def train_epoch(
        self, epoch: int, on_step: Callable[[StepReport], None] | None, stop: Callable[[], bool] | None
    ) -> None:
        """Train the remaining updates of `epoch`."""
        begun, seconds, images = perf_counter(), self.progress.seconds, self.progress.images
        pending: list[tuple[Tensor, float]] = []  # the loss and the rate of the updates since the last read
        anneal(self.state.model, self.recipe, epoch)
        self.model.train()
        plan, batches = self._batches(epoch)
        for step, update in plan:
            pending.append((self._update(epoch, step, update, batches), self.rate))
            self.progress.step = step + 1
            if (step + 1) % self.sync_every and step + 1 < self.steps:
                continue
            stop_requested = self._read_losses(epoch, pending, bool(stop and stop()))
            pending.clear()
            elapsed = perf_counter() - begun
            self.progress.seconds = seconds + elapsed
            if on_step:
                pace = (self.progress.images - images) / max(elapsed, 1e-9)
                mean = self.progress.loss / self.progress.images
                on_step(StepReport(epoch, step + 1, self.steps, mean, self.rate, pace))
            if step + 1 < self.steps:
                self.stop_if(stop_requested, agreed=True)

    @property
    def rate(self) -> float:
        """The current learning rate of the parameters nearest to the head."""
        return max(float(group["lr"]) for group in self.optimiser.param_groups)

    def _batches(self, epoch: int) -> tuple[Iterator[tuple[int, Update]], Iterator[tuple[Tensor, Tensor]]]:
        """Return the remaining updates of the epoch with their steps, and the micro-batches of all of them."""
        recipe, first = self.recipe, self.progress.step
        rows = epoch_rows(len(self.data.train), recipe.repeats, self.seed, epoch)
        seeds = np.random.default_rng(derive(self.seed, epoch, "augmentation")).integers(2**62, size=len(rows))
        plan = list(updates(rows, seeds, recipe.batch_size, self.micro, recipe.drop_last, self.engine.part))[first:]
        shares = (share for update in plan for share in update.shares)
        return enumerate(plan, first), self.data.train.batches(shares, recipe.augmentation)

    def _update(self, epoch: int, step: int, update: Update, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Perform one update, and return this process's part of the loss, summed over the images of the update."""
        engine, recipe, part = self.engine, self.recipe, self.engine.part
        reseed(derive(self.seed, epoch, f"noise/{step}/{part.rank}"))
        self.scheduler.step(recipe.schedule_at(epoch, step, self.steps))
        summed = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, share in enumerate(update.shares):
            begun = perf_counter()
            batch = next(batches)
            self.progress.waited += perf_counter() - begun
            batch, empty = _readable(*batch, even=self.mixup is not None)
            images, labels = engine.to_device(*batch, self.dtype)
            if self.mixup:
                images, labels = self.mixup(images, labels.clamp(min=0))
            with engine.training():
                logits = self.model(images)
                loss = logits.sum() * 0 if empty else F.cross_entropy(
                    logits, labels, label_smoothing=0 if self.mixup else recipe.label_smoothing
                )  # fmt: skip
            with engine.accumulating(self.model, index + 1 < len(update.shares)):
                # gradients are averaged over processes: times `world` it is the mean over the update's images
                (loss * (share.real * part.world / update.size)).backward()
            summed += loss.detach().double() * share.real
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.state.model.parameters(), recipe.clip_grad)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.state.ema is not None:
            self.state.ema.update(self.state.model)
        self.progress.images += update.size
        return summed

    def _read_losses(self, epoch: int, pending: list[tuple[Tensor, float]], stop: bool) -> bool:
        """Add the losses of the last updates, over all processes, to the progress, and return whether any process is to
        stop. Raises DivergedError."""
        losses, rates = zip(*pending, strict=True)
        *sums, stops = self.engine.sum(torch.stack([*losses, torch.tensor(float(stop), device=losses[0].device)]))
        for step, (value, rate) in enumerate(zip(sums, rates, strict=True), self.progress.step - len(sums) + 1):
            if not math.isfinite(value):
                where = f"epoch {epoch + 1}, step {step}, lr {rate:.3g}"
                raise DivergedError(f"training loss {value} at {where}", self._last_good())
        self.progress.loss += sum(sums)
        return stops > 0

    def _last_good(self) -> Path | None:
        return self.path if self.path is not None and self.path.exists() else None

    def finish_epoch(self, epoch: int) -> EpochResult:
        """Evaluate, add the epoch to the progress and write the checkpoint. Raises DivergedError."""
        begun, state = perf_counter(), self.state
        self.engine.agree(state.model)
        after = evaluate(state.model, self.data.val, engine=self.engine)
        averaged = evaluate(state.ema.module, self.data.val, engine=self.engine) if state.ema else None
        if not math.isfinite(after.loss):
            raise DivergedError(f"validation loss {after.loss} after epoch {epoch + 1}", self._last_good())
        done = self.progress
        result = EpochResult(
            train_loss=done.loss / done.images,
            val_loss=after.loss,
            val_top1=after.top1,
            seconds=done.seconds + perf_counter() - begun,
            val_top5=after.top5,
            lr=self.rate,
            ema_top1=averaged.top1 if averaged else None,
            broken=int(self.engine.sum([len(self.data.train.broken)])[0]),
            waited=done.waited,
        )
        state.progress = Progress(epochs=(*done.epochs, result))
        self._save()
        return result

    def stop_if(self, requested: bool, agreed: bool = False) -> None:
        """Write the checkpoint and raise Stopped if any process was asked to stop."""
        if not (requested if agreed else self.engine.sum([float(requested)])[0]):
            return
        if self.path:
            self._save()
        done = self.progress
        kept = f"; checkpoint {self.path}" if self.path else ""
        raise Stopped(
            f"stopped after epoch {len(done.epochs)}" + (f" and {done.step} steps" if done.step else "") + kept
        )

    def _save(self) -> None:
        if self.path:
            checkpoints.save(self.path, self.owner, self.state, self.engine)

    def close(self) -> None:
        """Remove from the model what is only needed in training."""
        anneal(self.state.model, self.recipe, self.recipe.epochs, done=True)
        self.engine.release(self.model)


def _readable(images: Tensor, labels: Tensor, even: bool) -> tuple[tuple[Tensor, Tensor], bool]:
    """Return the readable images of a micro-batch, an `even` number of them if requested, and whether there are none.
    In that case the batch is returned unchanged, since every process must take part in the update."""
    readable = labels != UNREADABLE
    if bool(readable.all()):
        return (images, labels), False
    rows = readable.nonzero()[:, 0]
    rows = rows[: len(rows) - len(rows) % 2] if even else rows
    return ((images[rows], labels[rows]), False) if len(rows) else ((images, labels), True)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, *, engine: Engine | None = None, batch_size: int = 512) -> Metrics:
    """Return loss, top-1 and top-5 of `model` over every image of `split`, each counted once over all processes.

    The model runs in evaluation mode, and its previous mode is restored. It must be on the device of the engine. Raises
    InputError if no image can be read.
    """
    engine = engine or Engine()
    was_training, dtype = model.training, next(model.parameters(), torch.zeros(())).dtype
    model.eval()
    shares = list(in_order(len(split), batch_size, engine.part))
    sums = torch.zeros(5, dtype=torch.float64, device=engine.device)
    with unprobed():
        for share, batch in zip(shares, split.batches(shares, None), strict=True):
            images, labels = engine.to_device(*batch, dtype)
            with engine.accelerator.autocast():
                logits = model(images)
            sums += _counts(logits[: share.real].double(), labels[: share.real])
    model.train(was_training)
    loss, top1, top5, count, unreadable = engine.sum(sums)
    if not count:
        raise InputError(f"data: none of the {len(split)} images can be read")
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), int(unreadable))


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (summed loss, correct, correct among five, readable, unreadable)."""
    readable = labels != UNREADABLE
    logits, right = logits[readable], labels[readable]
    best = logits.topk(min(5, logits.shape[1]), 1).indices == right[:, None]
    loss = F.cross_entropy(logits, right, reduction="sum")
    return torch.stack([loss, best[:, 0].sum(), best.sum(), readable.sum(), (~readable).sum()]).double()


def anneal(model: nn.Module, recipe: Recipe, epoch: int, done: bool = False) -> None:
    """Set the temperature for `epoch` of every mixer that predicts coefficients by softmax."""
    for module in model.modules():
        if isinstance(module, Mixer) and isinstance(module.spec.mix, Predict) and module.spec.mix.gate == "softmax":
            module.temperature = None if done else recipe.temperature_at(epoch, module.spec.mix.tau)


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not recipe.mixes:
        return None
    return Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mixup_prob,
                 switch_prob=recipe.mixup_switch_prob, label_smoothing=recipe.label_smoothing,
                 num_classes=num_classes)  # fmt: skip


def _micro_batch(recipe: Recipe, engine: Engine) -> int:
    """Return the number of images per forward pass and process. Raises InputError if it does not divide the batch of
    the recipe."""
    share, rest = divmod(recipe.batch_size, engine.part.world)
    if rest:
        raise InputError(f"recipe: invalid batch_size={recipe.batch_size} on {engine.part.world} processes; "
                         "expected a multiple of their number")  # fmt: skip
    requested = engine.hardware.micro_batch
    micro = share if requested is None else min(requested, share)
    if micro < 1 or (recipe.mixes and (micro % 2 or share % micro % 2)):
        raise InputError(f"hardware: invalid micro_batch={requested} for {share} images per process; "
                         "expected a whole number >= 1, even with Mixup or CutMix")  # fmt: skip
    return micro
