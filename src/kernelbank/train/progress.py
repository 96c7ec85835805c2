"""Show the progress of a run: a live bar in a terminal, else a line per epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from kernelbank.records import EpochResult
from kernelbank.train.loop import StepReport

WAITING = 0.05
"""The fraction of an epoch spent waiting for data above which it is reported."""


class Watch:
    """The display of the steps and epochs of a run."""

    def __init__(self, console: Console, epochs: int, bars: Progress | None) -> None:
        self.console, self.epochs, self.bars = console, epochs, bars
        self.trained, self.done, self.first = 0.0, 0, None  # type: float, int, float | None
        self.start, self.top1 = monotonic(), ""
        self.task = None if bars is None else bars.add_task("", total=epochs)

    def step(self, report: StepReport) -> None:
        """Show the progress of the current epoch."""
        position = report.epoch + report.step / report.steps
        if self.first is None:
            self.first = report.epoch
        if self.bars is None or self.task is None:
            return
        parts = [
            f"epoch {report.epoch + 1}/{self.epochs}", f"loss {report.loss:.3f}", self.top1,
            f"{report.images_per_second:,.0f} images/s", self._left(position),
        ]  # fmt: skip
        self.bars.update(self.task, completed=position, description=" · ".join(filter(None, parts)))

    def epoch(self, result: EpochResult, restored: bool) -> None:
        """Show an epoch that ended or was read from the checkpoint."""
        self.done += 1
        self.top1 = f"top-1 {result.val_top1:.1f}"
        if restored:
            self.first = float(self.done)
            return
        self.say(f"epoch {self.done}/{self.epochs}: {outcome(result)}", self._left(self.done))

    def _left(self, position: float) -> str:
        """Return the estimated time left in words, from the epochs of this process; empty before the first."""
        trained = position - (self.first or 0.0)
        if trained <= 0:
            return ""
        seconds = (monotonic() - self.start) / trained * (self.epochs - position)
        return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left" if seconds < 5400 else (
            f"{seconds / 3600:.1f} h left"
        )  # fmt: skip

    def say(self, *parts: str) -> None:
        """Print a line."""
        self.console.print("; ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def watch(console: Console, epochs: int, shown: bool) -> Iterator[Watch | None]:
    """Show a run of `epochs` on `console` inside the context. The value is None if it is not to be `shown`."""
    if not shown:
        yield None
        return
    if not console.is_terminal:
        yield Watch(console, epochs, None)
        return
    with Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True) as bars:
        yield Watch(console, epochs, bars)


def outcome(result: EpochResult) -> str:
    """Return the results of an epoch in words."""
    parts = [f"loss {result.train_loss:.3f}", f"validation {result.val_loss:.3f}, top-1 {result.val_top1:.1f}"]
    if result.val_top5 is not None:
        parts[-1] += f", top-5 {result.val_top5:.1f}"
    if result.ema_top1 is not None:
        parts.append(f"averaged weights {result.ema_top1:.1f}")
    if result.lr is not None:
        parts.append(f"lr {result.lr:.2g}")
    parts.append(f"{result.seconds:.1f} s")
    if result.waited is not None and result.waited > WAITING * result.seconds:
        parts.append(f"{100 * result.waited / result.seconds:.0f} % of it waiting for data")
    if result.broken:
        parts.append(f"{result.broken} broken images so far")
    return ", ".join(parts)
