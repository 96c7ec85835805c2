"""Show the progress of a study: bars in a terminal, otherwise one line per finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kernelbank.records import RunRecord
from kernelbank.studies.run import Run
from kernelbank.studies.runner import EpochDone, Event, Note, RunDone, Sink


class _Tally:
    """Counts epochs and runs, and estimates the remaining time from the epochs of this process."""

    def __init__(self, runs: int, epochs: int) -> None:
        self.runs, self.total = runs, epochs
        self.epochs, self.runs_done = 0, 0
        self.start = monotonic()

    def count(self, event: Event) -> None:
        if isinstance(event, EpochDone):
            self.epochs += not event.restored
            self.total -= event.restored
        elif isinstance(event, RunDone):
            self.runs_done += 1
            self.total -= event.run.recipe.epochs - len(event.record.epochs)  # a diverged run skips its rest

    @property
    def time_left(self) -> str:
        """Return the remaining time in words; empty before the first epoch."""
        if not self.epochs and self.total:
            return ""
        seconds = (monotonic() - self.start) / max(self.epochs, 1) * (self.total - self.epochs)
        return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"


@contextmanager
def reporter(console: Console, runs: Sequence[Run]) -> Iterator[Sink]:
    """A sink for the runner's events that shows them on `console` while the context is open; `runs` are to be run."""
    tally = _Tally(len(runs), sum(run.recipe.epochs for run in runs))
    if not console.is_terminal:
        yield _Lines(console, tally)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[what]}"),
        console=console,
        transient=True,
    ) as bars:
        yield _Bars(bars, tally)


class _Lines:
    def __init__(self, console: Console, tally: _Tally) -> None:
        self.console, self.tally = console, tally

    def __call__(self, event: Event) -> None:
        self.tally.count(event)
        if isinstance(event, Note):
            self.console.print(event.text, markup=False, highlight=False, soft_wrap=True)
        elif isinstance(event, RunDone):
            place = f"[{self.tally.runs_done}/{self.tally.runs}]"
            text = "; ".join(filter(None, [f"{place} {event.run}: {outcome(event.record)}", self.tally.time_left]))
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bars:
    def __init__(self, bars: Progress, tally: _Tally) -> None:
        self.bars, self.tally = bars, tally
        self.overall = bars.add_task("study", total=tally.runs, what="runs")
        self.tasks: dict[Run, TaskID] = {}

    def __call__(self, event: Event) -> None:
        self.tally.count(event)
        if isinstance(event, Note):
            self.bars.console.print(event.text, markup=False, highlight=False)
        elif isinstance(event, EpochDone):
            if event.run not in self.tasks:
                self.tasks[event.run] = self.bars.add_task(str(event.run), total=event.run.recipe.epochs, what="epochs")
            what = f"epochs, validation top-1 {event.result.val_top1:.1f}"
            self.bars.update(self.tasks[event.run], advance=1, what=what)
        elif isinstance(event, RunDone) and event.run in self.tasks:
            self.bars.remove_task(self.tasks.pop(event.run))
        self.bars.update(
            self.overall, completed=self.tally.runs_done, what=", ".join(filter(None, ["runs", self.tally.time_left]))
        )


def outcome(record: RunRecord) -> str:
    """Return the result of a run in words."""
    if record.failure is not None:
        return f"diverged: {record.failure}"
    test = "" if record.test_top1 is None else f", test {record.test_top1:.1f}"
    return f"validation {record.epochs[-1].val_top1:.1f}{test} ({record.seconds:.1f} s)"
