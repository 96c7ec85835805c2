"""Runs to run records, in one process or several: what is finished is not repeated, what was interrupted goes on."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from kernelbank.errors import InputError, WorkerError
from kernelbank.files import set_aside
from kernelbank.records import EpochResult, RecordError, RunRecord
from kernelbank.studies.run import Conditions, Run, execute
from kernelbank.train.loop import Stopped
from kernelbank.train.session import Hooks
from kernelbank.train.signals import StopRequest

POLL = 0.5
"""Seconds between two looks at whether the study was asked to stop."""


@dataclass(frozen=True)
class EpochDone:
    """An epoch of `run` is over, or was read from its checkpoint (`restored`)."""

    run: Run
    result: EpochResult
    restored: bool = False


@dataclass(frozen=True)
class RunDone:
    """`run` is recorded."""

    run: Run
    record: RunRecord


@dataclass(frozen=True)
class Note:
    """A line for the user, such as a broken file that was set aside."""

    text: str


@dataclass(frozen=True)
class Crash:
    """A worker hit an error that is a bug: the error in one line, and its traceback."""

    run: Run
    error: str
    traceback: str


@dataclass(frozen=True)
class InputFailure:
    """A worker hit an error that the user can fix: it is raised in the parent as it is."""

    error: InputError | OSError


Event = EpochDone | RunDone | Note | Crash | InputFailure
Sink = Callable[[Event], None]


def finished(runs: Sequence[Run], folder: Path, notify: Callable[[str], None]) -> dict[Run, RunRecord]:
    """The run records in the folder. A file that is not a run record, or not the whole record of its run, is named and
    set aside, and its run counts as unfinished."""
    records: dict[Run, RunRecord] = {}
    for run in runs:
        path = run.record_path(folder)
        if not path.exists():
            continue
        try:
            record = RunRecord.load(path)
            _check(record, run, path)
        except RecordError as error:
            notify(f"{' '.join(str(error).split())}; set aside as {set_aside(path).name}, the run is repeated")
        else:
            records[run] = record
    return records


def _check(record: RunRecord, run: Run, path: Path) -> None:
    """Raises RecordError unless `record` is that of `run`, and whole or with a failure."""
    if differing := [name for name, value in run.identity.items() if getattr(record, name) != value]:
        raise RecordError(f"{path} is not the record of {run} (its {', '.join(differing)} differs)")
    if record.failure is not None:
        return
    if len(record.epochs) != run.recipe.epochs:
        raise RecordError(f"{path} holds {len(record.epochs)} of {run.recipe.epochs} epochs and no failure")
    tested = {"test_loss": record.test_loss, "test_top1": record.test_top1}
    numbers = tested if record.data.test else {}
    for index, epoch in enumerate(record.epochs):
        measured = {name: value for name, value in asdict(epoch).items() if value is not None}
        numbers |= {f"epochs[{index}].{name}": value for name, value in measured.items()}
    if wild := [name for name, value in numbers.items() if value is None or not math.isfinite(value)]:
        raise RecordError(f"{path} has a {wild[0]} of {numbers[wild[0]]} and no failure")


@dataclass(frozen=True)
class Crew:
    """How many processes run at a time, and the GPU of each where there are GPUs (what CUDA_VISIBLE_DEVICES takes)."""

    jobs: int = 1
    gpus: tuple[str, ...] = ()


def run_all(
    runs: Sequence[Run], conditions: Conditions, folder: Path, crew: Crew, sink: Sink,
    stop: Callable[[], bool] | None = None,
) -> None:  # fmt: skip
    """Execute `runs` and send what happens to `sink`: in this process for one job, else in spawned ones.

    Raises:
        WorkerError: If a worker crashed or was killed; what was recorded stays.
        Stopped: Once `stop()` is true and every running run has its checkpoint.
    """
    if min(crew.jobs, len(runs)) > 1:
        _run_spawned(deque(runs), conditions, folder, crew, sink, stop or (lambda: False))
        return
    with _warnings_to(sink):
        for run in runs:
            _run_one(run, conditions, folder, sink, stop)


def make_folders(folder: Path) -> None:
    """The folders of run records and checkpoints below `folder`."""
    for name in ("records", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)


def _run_one(
    run: Run, conditions: Conditions, folder: Path, sink: Sink, stop: Callable[[], bool] | None = None
) -> None:
    hooks = Hooks(lambda *result: sink(EpochDone(run, *result)), stop=stop)
    sink(RunDone(run, execute(run, conditions, folder, hooks)))


# ---- worker processes --------------------------------------------------------------------------------------


def _run_spawned(
    pending: deque[Run], conditions: Conditions, folder: Path, crew: Crew, sink: Sink, stop: Callable[[], bool]
) -> None:
    """A worker has one pipe and takes one run at a time. Either end learns from the pipe that the other died."""
    context = get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for index in range(min(crew.jobs, len(pending))):
            ours, theirs = context.Pipe()
            gpu = crew.gpus[index % len(crew.gpus)] if crew.gpus else None
            # not daemons: they have processes of their own, which read images
            process: BaseProcess = context.Process(target=_serve, args=(theirs, conditions, folder, gpu))
            with _interrupts_blocked():  # Ctrl-C would end a worker that imports with a traceback
                process.start()
            theirs.close()
            workers[ours] = process
            _send(ours, process, pending.popleft())
        while workers:
            for pipe in wait(list(workers), timeout=POLL):
                assert isinstance(pipe, Connection)
                event = _receive(pipe, workers[pipe])
                sink(event)
                if isinstance(event, RunDone) and pending and not stop():
                    _send(pipe, workers[pipe], pending.popleft())
                elif isinstance(event, RunDone):
                    pipe.close()
                    workers.pop(pipe).join()
            if stop():
                _stop(workers)
                raise Stopped("stopped: every running run has its checkpoint")
    finally:
        for pipe, process in workers.items():
            process.kill()
            process.join()
            pipe.close()


def _stop(workers: dict[Connection, BaseProcess]) -> None:
    """Ask every worker to stop after its update, with a checkpoint, and wait for it."""
    for process in workers.values():
        process.terminate()
    for pipe, process in list(workers.items()):
        while process.is_alive():
            if pipe.poll(POLL):
                try:
                    pipe.recv()  # epochs that end in between, so that the pipe never fills
                except (EOFError, OSError):
                    break
        pipe.close()
        process.join()
        workers.pop(pipe)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread, and in the processes that it starts. Ctrl-C in between is delivered afterwards, or
    to another thread of this process; if the signal were ignored, it would be lost."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # which would unblock the signal when the first process starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(pipe: Connection, process: BaseProcess, run: Run) -> None:
    try:
        pipe.send(run)
    except (BrokenPipeError, ConnectionResetError):
        raise _ended(process) from None


def _receive(pipe: Connection, process: BaseProcess) -> Event:
    try:
        event: Event = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise _ended(process) from None
    if isinstance(event, InputFailure):
        raise event.error
    if isinstance(event, Crash):
        raise WorkerError(f"{event.run} crashed: {event.error}", event.traceback)
    return event


def _ended(process: BaseProcess) -> WorkerError:
    process.join(5)
    return WorkerError(f"a worker process ended by itself (exit code {process.exitcode})")


def _serve(pipe: Connection, conditions: Conditions, folder: Path, gpu: str | None) -> None:
    """A worker: runs until its parent closes the pipe, whether by intent or by dying, or asks it to stop."""
    request = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda number, _: setattr(request, "signal", number))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with _warnings_to(pipe.send):
        while not request():
            try:
                if not pipe.poll(POLL):
                    continue
                run: Run = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                _run_one(run, conditions, folder, pipe.send, request)
            except (BrokenPipeError, Stopped):
                return
            except (InputError, OSError) as error:
                pipe.send(InputFailure(error))
                return
            except Exception as error:
                pipe.send(Crash(run, f"{type(error).__name__}: {error}", traceback.format_exc()))
                return


class _Notes(logging.Handler):
    def __init__(self, sink: Sink) -> None:
        super().__init__(logging.WARNING)
        self.sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        self.sink(Note(record.getMessage()))


@contextmanager
def _warnings_to(sink: Sink) -> Iterator[None]:
    """Warnings that the package logs become notes."""
    logger, handler = logging.getLogger("kernelbank"), _Notes(sink)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
