"""Execute runs in one process or several. Runs with a record are skipped, and interrupted runs are resumed."""

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
    """An epoch of `run` was trained, or read from its checkpoint (`restored`)."""

    run: Run
    result: EpochResult
    restored: bool = False


@dataclass(frozen=True)
class RunDone:
    """The record of `run` was written."""

    run: Run
    record: RunRecord


@dataclass(frozen=True)
class Note:
    """A message for the user, for example about a damaged file."""

    text: str


@dataclass(frozen=True)
class Crash:
    """A run raised an unexpected error: the error in one line, and its traceback."""

    run: Run
    error: str
    traceback: str


@dataclass(frozen=True)
class InputFailure:
    """A run raised an error that the user can fix. The parent process raises it again."""

    error: InputError | OSError


Event = EpochDone | RunDone | Note | Crash | InputFailure
Sink = Callable[[Event], None]


def finished(runs: Sequence[Run], folder: Path, notify: Callable[[str], None]) -> dict[Run, RunRecord]:
    """Return the run records in the folder. A file that is not a complete run record of its run is renamed, with a
    message, and the run counts as unfinished."""
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
    """Raise RecordError unless `record` is the record of `run`, and is complete or has a failure."""
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
class WorkerPool:
    """The number of processes that run at a time, and the GPUs that they use, as values of CUDA_VISIBLE_DEVICES."""

    jobs: int = 1
    gpus: tuple[str, ...] = ()


def run_all(
    runs: Sequence[Run], conditions: Conditions, folder: Path, pool: WorkerPool, sink: Sink,
    stop: Callable[[], bool] | None = None,
) -> None:  # fmt: skip
    """Execute `runs` and send events to `sink`, in this process for one job, otherwise in spawned processes.

    Raises:
        WorkerError: If a worker crashed or was killed. Existing records are kept.
        Stopped: Once `stop()` is true and every active run has written its checkpoint.
    """
    if min(pool.jobs, len(runs)) > 1:
        _run_spawned(deque(runs), conditions, folder, pool, sink, stop or (lambda: False))
        return
    with _warnings_to(sink):
        for run in runs:
            _run_one(run, conditions, folder, sink, stop)


def make_folders(folder: Path) -> None:
    """Create the folders of run records and checkpoints below `folder`."""
    for name in ("records", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)


def _run_one(
    run: Run, conditions: Conditions, folder: Path, sink: Sink, stop: Callable[[], bool] | None = None
) -> None:
    hooks = Hooks(lambda *result: sink(EpochDone(run, *result)), stop=stop)
    sink(RunDone(run, execute(run, conditions, folder, hooks)))


# ---- worker processes --------------------------------------------------------------------------------------


def _run_spawned(
    pending: deque[Run], conditions: Conditions, folder: Path, pool: WorkerPool, sink: Sink, stop: Callable[[], bool]
) -> None:
    """Execute runs in spawned processes. Each has a pipe and gets one run at a time; either end detects from the pipe
    that the other one ended."""
    context = get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for index in range(min(pool.jobs, len(pending))):
            ours, theirs = context.Pipe()
            gpu = pool.gpus[index % len(pool.gpus)] if pool.gpus else None
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
                raise Stopped("stopped: every active run wrote its checkpoint")
    finally:
        for pipe, process in workers.items():
            process.kill()
            process.join()
            pipe.close()


def _stop(workers: dict[Connection, BaseProcess]) -> None:
    """Ask every worker to stop after its current update, with a checkpoint, and wait until they end."""
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
    return WorkerError(f"a worker process ended unexpectedly (exit code {process.exitcode})")


def _serve(pipe: Connection, conditions: Conditions, folder: Path, gpu: str | None) -> None:
    """The main function of a worker: execute runs until the parent closes the pipe, ends, or sends SIGTERM."""
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
    """Send warnings that the package logs to `sink` as notes."""
    logger, handler = logging.getLogger("kernelbank"), _Notes(sink)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
