"""Runs to records, one process or several: what is finished is not repeated, what was interrupted goes on."""

from __future__ import annotations

import logging
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from kernelbank.data.dataset import Dataset
from kernelbank.data.load import load
from kernelbank.files import set_aside
from kernelbank.records import EpochResult, RecordError, RunRecord
from kernelbank.studies.run import Run, execute


@dataclass(frozen=True)
class EpochDone:
    """An epoch of `run` is over (or was read from its checkpoint)."""

    run: Run
    result: EpochResult


@dataclass(frozen=True)
class RunDone:
    """`run` is recorded."""

    run: Run
    record: RunRecord


@dataclass(frozen=True)
class Note:
    """Something to tell: a broken file that was set aside."""

    text: str


@dataclass(frozen=True)
class Crash:
    """A worker met an error that is a bug; its traceback."""

    run: Run
    traceback: str


Event = EpochDone | RunDone | Note | Crash
Sink = Callable[[Event], None]


class WorkerError(RuntimeError):
    """A worker process crashed or was killed."""


def finished(runs: Sequence[Run], folder: Path, tell: Callable[[str], None]) -> dict[Run, RunRecord]:
    """The records that are there. A file that is no record is named, set aside, and its run is not finished."""
    records: dict[Run, RunRecord] = {}
    for run in runs:
        path = run.record_path(folder)
        if not path.exists():
            continue
        try:
            records[run] = RunRecord.load(path)
        except RecordError as error:
            tell(f"{error}; set aside as {set_aside(path).name}, the run is repeated")
    return records


def run_all(runs: Sequence[Run], folder: Path, workers: int, sink: Sink) -> None:
    """Execute `runs`, telling `sink` what happens: in this process for one worker, else in spawned ones.

    Raises WorkerError when a worker crashed or was killed; what was recorded stays.
    """
    for name in ("records", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    if min(workers, len(runs)) > 1:
        _run_spawned(deque(runs), folder, min(workers, len(runs)), sink)
        return
    with _warnings_to(sink):
        for run in runs:
            _run_one(run, folder, sink)


def _run_one(run: Run, folder: Path, sink: Sink) -> None:
    record = execute(run, _dataset(run.data.name), folder, lambda result: sink(EpochDone(run, result)))
    sink(RunDone(run, record))


@cache
def _dataset(name: str) -> Dataset:
    return load(name)


# ---- worker processes --------------------------------------------------------------------------------------


def _run_spawned(pending: deque[Run], folder: Path, workers: int, sink: Sink) -> None:
    """A worker holds one pipe and takes one run at a time. Either end learns of the other's death from the pipe."""
    context = get_context("spawn")
    crew: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(target=_serve, args=(there, folder), daemon=True)
            process.start()
            there.close()
            crew[here] = process
            here.send(pending.popleft())
        while crew:
            for pipe in wait(list(crew)):
                assert isinstance(pipe, Connection)
                event = _receive(pipe, crew[pipe])
                sink(event)
                if isinstance(event, RunDone) and pending:
                    pipe.send(pending.popleft())
                elif isinstance(event, RunDone):
                    pipe.close()
                    crew.pop(pipe).join()
    finally:
        for pipe, process in crew.items():
            process.terminate()
            process.join()
            pipe.close()


def _receive(pipe: Connection, process: BaseProcess) -> Event:
    try:
        event: Event = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        raise WorkerError(f"a worker process ended unasked (exit code {process.exitcode})") from None
    if isinstance(event, Crash):
        raise WorkerError(f"{event.run} crashed:\n{event.traceback}")
    return event


def _serve(pipe: Connection, folder: Path) -> None:
    """A worker: runs until its parent closes the pipe, whether by intent or by dying."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    with _warnings_to(pipe.send):
        while True:
            try:
                run: Run = pipe.recv()
            except EOFError:
                return
            try:
                _run_one(run, folder, pipe.send)
            except BrokenPipeError:
                return
            except Exception:
                pipe.send(Crash(run, traceback.format_exc()))
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
