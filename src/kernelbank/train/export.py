"""The weights of a run as files: plain safetensors with timm's names, and which model they are in the metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.files import replace_file
from kernelbank.records import RunRecord
from kernelbank.train import checkpoint as checkpoints
from kernelbank.train.model import ModelSpec, spec_metadata
from kernelbank.train.runs import RunFolder


def write_weights(folder: RunFolder, spec: ModelSpec, record: RunRecord, *, main: bool) -> None:
    """The weights of the run's last checkpoint, and the averaged ones if there are any."""
    if not main:
        return
    _, tensors = checkpoints.read(folder.checkpoint)
    final = replace(spec, mixer=record.mixer or None, mlp=record.mlp or None)
    for prefix, path in (("model.", folder.weights), ("ema.", folder.ema)):
        if state := _part(tensors, prefix):
            _write(path, to_bytes(state, spec_metadata(final)))


def _write(path: Path, content: bytes) -> None:
    replace_file(path, lambda beside: beside.write_bytes(content))


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
