"""The weights of a run as files for `kernelbank.load`, and from its last checkpoint."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.train import checkpoint as checkpoints
from kernelbank.train.runs import RunFolder
from kernelbank.weights.file import save_model


def write_weights(folder: RunFolder, spec: ModelSpec) -> None:
    """The weights of the run's last checkpoint, and the averaged ones if there are any; `spec` describes the model as
    it was trained."""
    _, tensors = checkpoints.read(folder.checkpoint)
    for prefix, path in (("model.", folder.weights), ("ema.", folder.ema)):
        if state := _part(tensors, prefix):
            save_model(path, state, spec, "kernelbank train")


def read_run_weights(folder: RunFolder, model: nn.Module, ema: bool) -> str:
    """Load the weights of the run's last checkpoint into `model`; says which they are. Raises InputError."""
    for path in (folder.checkpoint, checkpoints.previous(folder.checkpoint)):
        try:
            document, tensors = checkpoints.read(path)
            break
        except (SafetensorError, OSError, ValueError, KeyError):
            continue
    else:
        raise InputError(f"run: {folder.path} holds no checkpoint that can be read")
    state = _part(tensors, "ema." if ema else "model.")
    if not state:
        raise InputError(f"ema: {folder.path} has no averaged weights; its recipe has ema=None")
    with torch.no_grad():
        model.load_state_dict(state)
    epochs = len(document["progress"]["epochs"])
    return f"{'averaged weights' if ema else 'weights'} after epoch {epochs}"


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
