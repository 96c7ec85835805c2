"""Read and write files of weights, with one metadata schema for every file that this library writes.

Code in a pickle is never run (see `weights.pickles`). The metadata of a safetensors file of this
library contains, under ``kernelbank``, a JSON object with ``file_version``, ``model`` (`ModelSpec.to_document`) and
``source``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.files import replace_file
from kernelbank.model import ModelSpec
from kernelbank.text import suggest
from kernelbank.weights import version1
from kernelbank.weights.contents import Contents, find
from kernelbank.weights.keymap import State
from kernelbank.weights.pickles import read_pickle

ENTRY, FILE_VERSION = "kernelbank", 2
SAFETENSORS, PICKLES = ".safetensors", (".pth", ".pt", ".bin")
SUFFIXES = (SAFETENSORS, *PICKLES)


def read_state(path: Path, entry: str | None = None) -> Contents:
    """Return the tensors of a weights file, which may be a training checkpoint, and its metadata (safetensors only).
    `entry` names the entry of a checkpoint that is taken (see `contents.find`).

    Raises:
        InputError: If the file is missing, truncated or corrupted, or contains code, no tensors or no such entry.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}{suggest(path.suffix, SUFFIXES)}; "
                         f"expected {', '.join(SUFFIXES)}")  # fmt: skip
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    loaded, metadata = _read_safetensors(path) if path.suffix == SAFETENSORS else (read_pickle(path), {})
    return replace(find(loaded, str(path), entry), metadata=metadata)


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: truncated or not safetensors: {error}") from None


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
    """The tensors of a weights file, and the description of their model in a file of ours, else None: `open_model_file`
    without what it says about the file."""
    contents, spec = open_model_file(path)
    return contents.state, spec


def open_model_file(path: Path, entry: str | None = None) -> tuple[Contents, ModelSpec | None]:
    """The contents of a weights file, and the description of their model in a file of ours, else None. Files of
    KernelBank 0.1 are read as those of today.

    Raises:
        InputError: If the file cannot be read, or its description is damaged or of another version.
    """
    contents = read_state(path, entry)
    metadata = contents.metadata
    try:
        if ENTRY not in metadata:
            spec = version1.trained(metadata)
            return (contents, None) if spec is None else (_upgraded(contents, spec), spec)
        document = json.loads(metadata[ENTRY])
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object, got {type(document).__name__}")
        if document.get("version") == 1:
            spec = version1.converted(document)
            return _upgraded(contents, spec), spec
        if (version := document.get("file_version")) != FILE_VERSION:
            raise InputError(f"{path}: invalid file_version={version!r}; expected {FILE_VERSION}, or the version 1 of "
                             "KernelBank 0.1")  # fmt: skip
        return contents, ModelSpec.from_document(document.get("model"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the description of the model in its metadata is damaged: {error}") from None


def _upgraded(contents: Contents, spec: ModelSpec) -> Contents:
    return replace(contents, state=version1.upgraded(contents.state, spec))
