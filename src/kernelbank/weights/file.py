"""Read and write files of weights, with one metadata schema for every file that this library writes.

Pickles are read with ``weights_only``, so that code in them is never run. The metadata of a safetensors file of this
library contains, under ``kernelbank``, a JSON object with ``file_version``, ``model`` (`ModelSpec.to_document`) and
``source``.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.files import replace_file
from kernelbank.model import ModelSpec
from kernelbank.text import suggest
from kernelbank.weights.keymap import State, listed

ENTRY, FILE_VERSION = "kernelbank", 2
SAFETENSORS, PICKLES = ".safetensors", (".pth", ".pt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module")
"""The keys under which training scripts store the weights (DeiT and Swin, mmpretrain and timm, others)."""
PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DistributedDataParallel and torch.compile add to every key."""


def read_state(path: Path) -> tuple[State, dict[str, str]]:
    """Return the tensors of a weights file, unwrapped, and its metadata (safetensors only).

    Raises:
        InputError: If the file is missing, truncated or corrupted, or contains code or no tensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}{suggest(path.suffix, SUFFIXES)}; "
                         f"expected {', '.join(SUFFIXES)}")  # fmt: skip
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    loaded, metadata = _read_safetensors(path) if path.suffix == SAFETENSORS else (_read_pickle(path), {})
    return unwrap(loaded, str(path)), metadata


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: truncated or not safetensors: {error}") from None


def _read_pickle(path: Path) -> Any:
    with path.open("rb"):  # what cannot be opened is an OSError with its reason
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles that torch did not write; they are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything: struct.error, RuntimeError, KeyError, ...
        held = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if held:
        raise InputError(f"{path}: holds {held[1]}, not only weights; it is not read, as that could run code: save "
                         "its state dict alone")  # fmt: skip
    raise InputError(f"{path}: truncated or corrupted, or not a checkpoint of torch")


def unwrap(loaded: object, what: str) -> State:
    """Return the state dict in `loaded`, which may be under one of `WRAPPERS`, with `PREFIXES` removed from its keys.

    Raises:
        InputError: If there are no tensors, or values that are not tensors.
    """
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inside = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inside is None:
            break
        loaded = inside
    if not isinstance(loaded, Mapping) or not loaded:
        held = listed(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise InputError(f"{what}: no state dict, but {held or 'nothing'}; looked under {', '.join(WRAPPERS)}")
    if strange := [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{what}: {listed(strange)} {'is no tensor' if len(strange) == 1 else 'are no tensors'}")
    state = {str(key): value.detach() for key, value in loaded.items()}
    if complex_ones := [key for key, value in state.items() if value.is_complex()]:
        raise InputError(f"{what}: {listed(complex_ones)}: complex numbers; expected real ones")
    if empty := [key for key, value in state.items() if value.numel() == 0]:
        raise InputError(f"{what}: {listed(empty)}: no numbers; expected at least one")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_destination(path: Path) -> None:
    """Raise InputError unless a safetensors file can be written to `path`."""
    if path.suffix != SAFETENSORS:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; expected {SAFETENSORS}")
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder")
        if not path.parent.is_dir():
            raise InputError(f"{path}: no such folder {path.parent}")
    except OSError as error:  # a name that is too long
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, completely or not at all. Raises InputError if it cannot be written."""
    check_destination(path)
    whole, storages = {}, set[int]()
    for key, tensor in state.items():  # safetensors refuses tensors that share memory
        shared = tensor.untyped_storage().data_ptr() in storages
        whole[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        storages.add(whole[key].untyped_storage().data_ptr())

    def fill(beside: Path) -> None:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their owner reads
        save_file(whole, beside, {"format": "pt", **metadata})
        _sort_metadata(beside)
        beside.chmod(mode)

    try:
        replace_file(path, fill)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place. The library writes it in an order that differs between
    processes, so that equal models would have different bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "a header grows by sorting"
        file.seek(8)
        file.write(text.ljust(size))


# ---- files of ours ---------------------------------------------------------------------------------------


def save_model(path: str | Path, state: Mapping[str, Tensor], spec: ModelSpec, source: str = "") -> None:
    """Write a state dict with the description of its model for `kernelbank.load`, completely or not at all. `source`
    states the origin of the weights. Raises InputError if the file cannot be written."""
    document = {"file_version": FILE_VERSION, "model": spec.to_document(), "source": source}
    write_state(Path(path), state, {ENTRY: json.dumps(document, sort_keys=True)})


def read_model_file(path: Path) -> tuple[State, ModelSpec | None]:
    """The tensors of a weights file, and the description of their model in a file of ours, else None.

    Raises:
        InputError: If the file cannot be read, or its entry is damaged or of another version.
    """
    state, metadata = read_state(path)
    return state, read_entry(metadata, str(path))


def read_entry(metadata: Mapping[str, str], source: str) -> ModelSpec | None:
    """The description in the metadata of a file; None in a file that is not ours. Raises InputError as
    `read_model_file`."""
    if ENTRY not in metadata:
        return None
    try:
        document = json.loads(metadata[ENTRY])
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object, got {type(document).__name__}")
        version = document.get("file_version", document.get("version"))
        if version != FILE_VERSION:
            raise InputError(f"{source}: invalid file_version={version!r}; expected {FILE_VERSION}; convert the "
                             "weights again")  # fmt: skip
        return ModelSpec.from_document(document.get("model"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: the kernelbank entry of its metadata is damaged: {error}") from None
