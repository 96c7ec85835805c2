"""The checkpoint of a run: one safetensors file with weights, averaged weights and optimiser state by name, and in its
metadata where the run stands. Whole or absent; the one before stays beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.files import replace_file, set_aside
from kernelbank.records import EpochResult
from kernelbank.train.engine import Engine, full, placed
from kernelbank.train.recipe import Recipe

log = logging.getLogger(__name__)
VERSION = 2


@dataclass
class Progress:
    """Where a run stands: whole `epochs`, then `step` updates into the next with their summed loss and images.

    No state of a generator is among it: every update seeds them anew from (seed, epoch, step, process).
    """

    epochs: list[EpochResult] = field(default_factory=list)
    step: int = 0
    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass
class State:
    """Everything that a run changes."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    progress: Progress

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, whole, on the processor. Every process must ask for them."""
        found = {f"model.{name}": full(tensor) for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema.{name}": full(tensor) for name, tensor in self.ema.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimiser.{name}.{key}"] = full(value)
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` where they belong."""
        for prefix, module in (("model", self.model), ("ema", None if self.ema is None else self.ema.module)):
            for name, tensor in {} if module is None else module.state_dict().items():
                tensor.copy_(placed(tensors[f"{prefix}.{name}"], tensor))
        parameters = dict(self.model.named_parameters())
        for key, value in tensors.items():
            kind, _, path = key.partition(".")
            if kind == "optimiser":
                name, _, leaf = path.rpartition(".")
                parameter = parameters[name]
                state = self.optimiser.state[parameter]
                state[leaf] = placed(value, parameter) if value.shape == parameter.shape else value


def owner(model: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes from it."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    owned: dict[str, Any] = json.loads(json.dumps({"recipe": asdict(recipe), "seed": seed, "model": shapes}))
    return owned


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` lies."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, owner: Mapping[str, Any], state: State, engine: Engine) -> None:
    """Write `state`, on the first process; the checkpoint that was there becomes the previous one."""
    if not (engine.main or engine.sharded):
        return
    tensors = state.tensors()  # where weights are shared out, every process gives its part
    if not engine.main:
        return
    document = {"version": VERSION, "owner": dict(owner), "progress": asdict(state.progress)}
    # safetensors' own writer hides what a full disk says; writing bytes raises an OSError
    content = to_bytes(tensors, {"kernelbank": json.dumps(document)})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with contextlib.suppress(OSError):  # a file system without hard links keeps one checkpoint
            previous(path).unlink(missing_ok=True)
            os.link(path, previous(path))
    replace_file(path, lambda beside: beside.write_bytes(content))


def discard(path: Path) -> None:
    """Delete the checkpoint and the one before."""
    for each in (path, previous(path)):
        each.unlink(missing_ok=True)


def resume(path: Path, owner: Mapping[str, Any], state: State, engine: Engine) -> bool:
    """Load the newest readable checkpoint into `state`; whether there was one.

    A file that cannot be read is logged and set aside. Raises InputError for the checkpoint of another run, naming
    what differs.
    """
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            document, tensors = read(candidate)
            progress = document["progress"]
            epochs = [EpochResult(**epoch) for epoch in progress.pop("epochs")]
            loaded = Progress(epochs=epochs, **progress)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            aside = set_aside(candidate).name if engine.main else "..."
            log.warning("%s is not a checkpoint (%s), set aside as %s", candidate, type(error).__name__, aside)
            continue
        if document["owner"] != owner:
            raise InputError(f"checkpoint: {candidate} belongs to another run: {differences(document['owner'], owner)}")
        state.load(tensors)
        state.progress = loaded
        return True
    return False


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a checkpoint. Raises what safetensors and JSON raise for another file."""
    with safe_open(path, framework="pt") as file:
        document = json.loads((file.metadata() or {})["kernelbank"])
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}")
        return document, {name: file.get_tensor(name) for name in file.keys()}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs, as "seed is 3, not 4", the first few; "a.b" is b inside a."""
    lines = list(_differing("", found, expected))
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _differing(path: str, found: Any, expected: Any) -> list[str]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = dict.fromkeys([*found, *expected])
        return [
            line for key in keys for line in _differing(f"{path}.{key}".lstrip("."), found.get(key), expected.get(key))
        ]
    return [] if found == expected else [f"its {path} is {found}, not {expected}"]
