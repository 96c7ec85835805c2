"""The checkpoint of a running run: written after each epoch, whole or absent, deleted when the run is recorded."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kernelbank.errors import InputError
from kernelbank.files import replace_file, set_aside
from kernelbank.records import EpochResult
from kernelbank.train.recipe import Recipe

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a model, an optimiser and a scheduler have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def owner(model: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes from it."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"recipe": asdict(recipe), "seed": seed, "shapes": shapes}


def save(path: Path, owner: Mapping[str, Any], parts: Mapping[str, Stateful], epochs: tuple[EpochResult, ...]) -> None:
    """Write the state of `parts` and the epochs so far, replacing the checkpoint of the epoch before."""
    states = {name: part.state_dict() for name, part in parts.items()}
    document = {"owner": dict(owner), "states": states, "epochs": [astuple(epoch) for epoch in epochs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()  # on a full disk torch.save raises a RuntimeError; writing bytes, an OSError
    torch.save(document, written)
    replace_file(path, lambda beside: beside.write_bytes(written.getbuffer()))


def resume(path: Path, owner: Mapping[str, Any], parts: Mapping[str, Stateful]) -> tuple[EpochResult, ...]:
    """Load the checkpoint at `path` into `parts` and return its epochs; none where there is no checkpoint.

    A file that cannot be read is logged, set aside and counts as none. Raises InputError for the checkpoint of
    another run.
    """
    if not path.exists():
        return ()
    try:
        document = torch.load(path, weights_only=True)
        found, states = document["owner"], {name: document["states"][name] for name in parts}
        epochs = tuple(EpochResult(*values) for values in document["epochs"])
    except Exception as error:  # a cut file fails as zip, pickle, key or end of file
        log.warning("%s is not a checkpoint (%s), set aside as %s; the run restarts", path,
                    type(error).__name__, set_aside(path).name)  # fmt: skip
        return ()
    if found != owner:
        differing = ", ".join(name for name in owner if found.get(name) != owner[name])
        raise InputError(f"checkpoint: {path} belongs to another run (its {differing} differs)")
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return epochs
