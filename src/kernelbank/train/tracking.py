"""Trackers of a run: TensorBoard, Weights & Biases and trackio, as Accelerate drives them."""

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
"""Takes the numbers of an epoch, and which epoch it is."""


@contextmanager
def tracking(engine: Engine, folder: Path, identity: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """The engine's trackers while the context is open, with `settings`, closed however it ends.

    A run that goes on is the same run to them, by `identity`. A tracker that fails later on is a warning: it does not
    end a run. Raises InputError where one cannot be started.
    """
    names = {
        "wandb": {"name": folder.name, "id": identity, "resume": "allow", "dir": folder},
        "trackio": {"name": f"{folder.name}-{identity}", "resume": "allow"},
    }
    accelerator = engine.accelerator
    try:
        accelerator.init_trackers(PROJECT, scalars(settings), names)
    except Exception as error:  # whatever a foreign service raises: no login, no network, another version
        which = ", ".join(map(str, accelerator.log_with))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"tracker: {which} cannot be started ({reason})") from None

    def track(values: Mapping[str, float], step: int) -> None:
        try:
            accelerator.log(dict(values), step=step)
        except Exception as error:
            log.warning("a tracker did not take epoch %d (%s: %s)", step, type(error).__name__, error)

    try:
        yield track
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def scalars(settings: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """Settings as TensorBoard takes them: numbers, words and truth values; all else as text."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()
    }
