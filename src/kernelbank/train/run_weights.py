"""The weights of a run: written as files for `kernelbank.load`, and read from its last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.train import checkpoint as checkpoints
from kernelbank.train.checkpoint import Checkpoint
from kernelbank.train.model import misfits
from kernelbank.train.runs import RunFolder
from kernelbank.weights.file import save_model

SOURCE = "kernelbank train"


def write_weights(folder: RunFolder, spec: ModelSpec) -> None:
    """Write the weights of the run's last checkpoint, and the averaged weights if there are any. `spec` describes the
    trained model."""
    tensors = checkpoints.read(folder.checkpoint).tensors
    for prefix, path in (("model.", folder.weights), ("ema.", folder.ema)):
        if state := _part(tensors, prefix):
            save_model(path, state, spec, SOURCE)


def keep_weights(checkpoint: Path, path: Path, spec: ModelSpec) -> None:
    """Write the weights of `checkpoint` to `path` with the description of the trained model."""
    save_model(path, _part(checkpoints.read(checkpoint).tensors, "model."), spec, SOURCE)


def read_run_weights(folder: RunFolder, model: nn.Module, ema: bool) -> str:
    """Load the weights of the run's last checkpoint, or its averaged weights, into `model`, and return which they are
    in words. Raises InputError."""
    checkpoint = _newest(folder)
    state = _part(checkpoint.tensors, "ema." if ema else "model.")
    if not state:
        raise InputError(f"invalid --ema: {folder.path} has no averaged weights; expected a run of a recipe with ema")
    if wrong := misfits(state, model.state_dict()):
        raise InputError(f"run: the checkpoint of {folder.path} does not fit its model: {wrong[0]}")
    with torch.no_grad():
        model.load_state_dict(state)
    return f"{'averaged weights' if ema else 'weights'} after epoch {len(checkpoint.progress.epochs)}"


def _newest(folder: RunFolder) -> Checkpoint:
    """The newest checkpoint that can be read. Raises InputError if there is none."""
    for path in (folder.checkpoint, checkpoints.previous(folder.checkpoint)):
        try:
            return checkpoints.read(path)
        except (OSError, ValueError):
            continue
    raise InputError(f"run: {folder.path} holds no checkpoint that can be read")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
