"""`load`: the model in a file that this library wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from kernelbank.errors import InputError, SpecError
from kernelbank.model import ModelSpec, TimmTrunk
from kernelbank.nn.build import build
from kernelbank.weights.file import read_model_file
from kernelbank.weights.from_timm import with_state
from kernelbank.weights.keymap import fit


def load(path: str | Path) -> nn.Module:
    """The model in a safetensors file that ``kernelbank convert``, ``kernelbank train`` or `save_model` wrote, in eval
    mode and in the dtype of its weights: a backbone of ours, or a stock model of timm with the mixers that were put
    into it.

    Raises:
        InputError: If the file is not one of ours, its description cannot be built, or a tensor is missing, left over
            or of another shape or type.
    """
    state, spec = read_model_file(Path(path))
    if spec is None:
        raise InputError(f"{path}: no kernelbank entry in its metadata; convert it with kernelbank convert")
    return rebuild(spec, state, str(path))


def rebuild(spec: ModelSpec, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of `spec` with `state` under its own names, in eval mode. Raises InputError as `load`."""
    try:
        if not isinstance(spec.trunk, TimmTrunk):
            return with_state(spec, state, source)
        model = build(spec)
    except SpecError as error:
        raise InputError(f"{source}: the description of its model cannot be built: {error}") from None
    fit(state, model.state_dict(), f"{source}: model {spec.trunk.name}")
    model.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return model.eval()
