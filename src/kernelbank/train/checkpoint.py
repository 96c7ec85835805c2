"""The checkpoint of a run: one safetensors file with its weights, averaged weights and optimiser state by name, and its
progress in the metadata. The file is complete or absent; the one before is kept beside it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.files import regular_file, replace_file, set_aside
from kernelbank.records import EpochResult
from kernelbank.schema import decode, encode
from kernelbank.text import one_line
from kernelbank.train.engine import Engine, full, placed
from kernelbank.train.recipe import Recipe

log = logging.getLogger(__name__)
VERSION = 2


@dataclass
class Progress:
    """How far a run has come: its complete `epochs`, then `step` updates of the next one with the sum of their losses
    and images, and the seconds in total and spent waiting for images.

    It has no generator states, since every update seeds the generators from (seed, epoch, step, process).
    """

    epochs: tuple[EpochResult, ...] = ()
    step: int = 0
    loss: float = 0.0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: the run that it belongs to, its progress, and the tensors of its `State`."""

    owner: Mapping[str, Any]
    progress: Progress
    tensors: Mapping[str, Tensor]


@dataclass
class State:
    """Everything that training changes."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    progress: Progress

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, whole and on the CPU. Every process must call it."""
        tensors = {f"model.{name}": full(tensor) for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": full(tensor) for name, tensor in self.ema.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{name}.{key}"] = full(value)
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned. Raises ValueError, before anything is changed, if a tensor is missing, unknown
        or of another shape."""
        own = {f"{prefix}.{name}": tensor for prefix, module in self._modules() for name, tensor in
               module.state_dict().items()}  # fmt: skip
        parameters = dict(self.model.named_parameters())
        states = [key for key in tensors if key.startswith("optimiser.") and _parameter(key) in parameters]
        if missing := [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]:
            raise ValueError(f"the tensor {missing[0]} is missing or has another shape")
        if unknown := sorted(set(tensors) - set(own) - set(states)):
            raise ValueError(f"the tensor {unknown[0]} is unknown")
        for name, tensor in own.items():
            tensor.copy_(placed(tensors[name], tensor))
        for key in states:
            parameter, value = parameters[_parameter(key)], tensors[key]
            state = self.optimiser.state[parameter]
            state[key.rpartition(".")[2]] = placed(value, parameter) if value.shape == parameter.shape else value

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "model", self.model
        if self.ema is not None:
            yield "ema", self.ema.module


def _parameter(key: str) -> str:
    """The parameter that a tensor ``optimiser.PARAMETER.NAME`` belongs to."""
    return key.removeprefix("optimiser.").rpartition(".")[0]


def owner(model: nn.Module, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that resumes from it."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    document: dict[str, Any] = json.loads(json.dumps({"recipe": asdict(recipe), "seed": seed, "model": shapes}))
    return document


def previous(path: Path) -> Path:
    """Return the path of the checkpoint before the one at `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, owner: Mapping[str, Any], state: State, engine: Engine) -> None:
    """Write `state` on the first process; the checkpoint that is already there becomes the previous one."""
    if not (engine.main or engine.sharded):
        return
    tensors = state.tensors()  # every process takes part where the weights are sharded
    if not engine.main:
        return
    document = {"version": VERSION, "owner": dict(owner), "progress": asdict(state.progress)}
    # safetensors' own writer hides the reason of a full disk; writing bytes raises an OSError
    content = to_bytes(tensors, {"kernelbank": json.dumps(encode(document))})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with contextlib.suppress(OSError):  # a file system without hard links keeps one checkpoint
            previous(path).unlink(missing_ok=True)
            os.link(path, previous(path))
    replace_file(path, lambda beside: beside.write_bytes(content))


def discard(path: Path) -> None:
    """Delete the checkpoint at `path` and the one before it."""
    for each in (path, previous(path)):
        each.unlink(missing_ok=True)


def resume(path: Path, owner: Mapping[str, Any], state: State, engine: Engine) -> bool:
    """Load the newest readable checkpoint into `state`, and return whether there was one.

    A file that cannot be read is logged and set aside. Raises InputError for the checkpoint of another run, naming
    the differences.
    """
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            checkpoint = read(candidate)
            if checkpoint.owner == owner:
                state.load(checkpoint.tensors)
        except (OSError, ValueError) as error:
            aside = set_aside(candidate).name if engine.main else "..."
            log.warning("%s is not a checkpoint (%s), set aside as %s", candidate, one_line(error, 120), aside)
            continue
        if checkpoint.owner != owner:
            changes = differences(checkpoint.owner, owner)
            raise InputError(f"checkpoint: {candidate} belongs to another run: {changes}")
        state.progress = checkpoint.progress
        return True
    return False


def read(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`.

    Raises:
        ValueError: If the file is damaged, or is not a checkpoint of this version.
        OSError: If it cannot be read.
    """
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("kernelbank", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"its metadata are not those of a checkpoint of version {VERSION}")
    if not isinstance(document.get("owner"), dict):
        raise ValueError("its metadata have no owner")
    return Checkpoint(document["owner"], decode(Progress, document.get("progress"), "progress"), tensors)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first differences in words, such as "its seed is 3; expected 4"; "a.b" is b inside a."""
    lines = list(_differences("", before, now))
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _differences(path: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        return [
            line for key in keys for line in _differences(f"{path}.{key}".lstrip("."), before.get(key), now.get(key))
        ]
    return [] if before == now else [f"its {path} is {before}; expected {now}"]
