"""Run a study on a Ray cluster: one task per run, which is retried if its node dies, with the same run records."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import ray
from ray import exceptions

from kernelbank.errors import InputError, WorkerError
from kernelbank.files import replace_text
from kernelbank.records import RunRecord
from kernelbank.studies.run import Conditions, Run, execute
from kernelbank.studies.runner import POLL, RunDone, Sink, finished, make_folders
from kernelbank.train.loop import Stopped
from kernelbank.train.session import Hooks

RETRIES = 5
"""The number of times a run is started again after its node or its process died."""
MARKER = ".cluster"


def run_on_ray(
    runs: Sequence[Run], conditions: Conditions, folder: Path, address: str, sink: Sink, stop: Callable[[], bool]
) -> None:
    """Execute `runs` as tasks of the Ray cluster at `address` and send their events to `sink`. The address ``ray`` is
    the running cluster that Ray finds (RAY_ADDRESS), or a new one on this machine.

    Nodes with access to `folder` write checkpoints there, so that a run whose node dies is resumed from its last epoch,
    and a run with a record is not trained again. On other nodes it is started again. The data must be at the same path
    on every node.

    Raises:
        InputError: If the cluster cannot be reached, or a run raises it.
        WorkerError: If a run crashed, or its node died more than `RETRIES` times.
        Stopped: Once `stop()` is true. The runs can be resumed from their last epoch.
    """
    with _connected(address):
        token = uuid4().hex
        replace_text(folder / MARKER, token)
        task = ray.remote(max_retries=RETRIES, **_needs(conditions))(_execute)
        waiting = {task.remote(run, conditions, str(folder.resolve()), token): run for run in runs}
        while waiting:
            if stop():
                raise Stopped("stopped: runs can be resumed from their last epoch")
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
            for reference in ready:
                run = waiting.pop(reference)
                record = RunRecord.from_document(_result(reference, run))
                record.save(run.record_path(folder))
                sink(RunDone(run, record))


def _execute(run: Run, conditions: Conditions, folder: str, token: str) -> dict[str, Any]:
    """The task of a node: return the run record as a document. A record in the folder is read instead of trained."""
    with _workspace(Path(folder), token) as here:
        known = finished([run], here, lambda _: None)
        record = known[run] if run in known else execute(run, conditions, here, Hooks())
        return record.to_document()


@contextmanager
def _workspace(folder: Path, token: str) -> Iterator[Path]:
    """Return the folder of the study if this node can access it, otherwise a folder of the node."""
    try:
        shared = (folder / MARKER).read_text(encoding="utf-8") == token
    except OSError:
        shared = False
    if shared:
        yield folder
        return
    with TemporaryDirectory(prefix="kernelbank-") as own:
        make_folders(Path(own))
        yield Path(own)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect to the cluster inside the context. Raises InputError."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of its default
    options: dict[str, Any] = {} if address == "ray" else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"on: no Ray cluster can be reached by {address} ({type(error).__name__}: {reason})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _needs(conditions: Conditions) -> dict[str, float]:
    """Return the resources of a run: a GPU if the cluster has GPUs, and a core for each process that reads images."""
    gpus = ray.cluster_resources().get("GPU", 0) if conditions.hardware.device == "auto" else 0
    return {"num_gpus": 1 if gpus else 0, "num_cpus": max(1, conditions.source.workers or 0)}


def _result(reference: Any, run: Run) -> Any:
    """The document that a task returned. Raises InputError, OSError and WorkerError."""
    try:
        return ray.get(reference)
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (InputError, OSError)):
            raise cause from None
        raise WorkerError(f"{run} crashed: {type(cause).__name__}: {cause}", str(error)) from None
    except exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise WorkerError(f"{run} could not be run in {RETRIES + 1} tries: {reason}") from None
