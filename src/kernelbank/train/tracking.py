"""Trackers of a run (TensorBoard, Weights & Biases and trackio) through Accelerate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernelbank.errors import InputError
from kernelbank.train.engine import Engine

log = logging.getLogger(__name__)
PROJECT = "kernelbank"

Track = Callable[[Mapping[str, float], int], None]
"""A function of the results of an epoch and its number."""


@contextmanager
def tracking(engine: Engine, folder: Path, identity: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Open the trackers of the engine with `settings`, and close them at the end of the context in any case.

    A resumed run continues its entry, which `identity` names. A tracker that fails later causes a warning and does not
    end the run. Raises InputError if a tracker cannot be started.
    """
    names = {
        "wandb": {"name": folder.name, "id": identity, "resume": "allow", "dir": folder},
        "trackio": {"name": f"{folder.name}-{identity}", "resume": "allow"},
    }
    accelerator = engine.accelerator
    try:
        accelerator.init_trackers(PROJECT, scalars(settings), names)
    except Exception as error:  # a service may raise any error: no login, no network, another version
        which = ", ".join(map(str, accelerator.log_with))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"tracker: {which} cannot be started ({reason})") from None

    def track(values: Mapping[str, float], step: int) -> None:
        try:
            accelerator.log(dict(values), step=step)
        except Exception as error:
            log.warning("a tracker failed in epoch %d (%s: %s)", step, type(error).__name__, error)

    try:
        yield track
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def scalars(settings: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Return settings as TensorBoard accepts them: numbers, text and booleans, and any other value as text."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()
    }
