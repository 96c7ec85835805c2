"""Folders as Hugging Face's hub has them: a ``config.json`` beside one file of weights, or beside shards with an
index that states which shard has which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelbank.errors import InputError
from kernelbank.weights.contents import Contents, find
from kernelbank.weights.file import read_state
from kernelbank.weights.keymap import State, listed

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
"""The names of the weights in a folder, in the order in which they are looked for; the index has ``.index.json``."""


def read_folder(folder: Path, entry: str | None = None) -> Contents:
    """Return the tensors of a folder, from one file or from its shards. `entry` as for `contents.find`.

    Raises:
        InputError: If there are no weights, the index is damaged, a shard is missing, or the shards do not hold exactly
            the tensors of the index.
    """
    for name in FILES:
        if (folder / name).is_file():
            return read_state(folder / name, entry)
        if (index := folder / f"{name}.index.json").is_file():
            return find(_read_shards(index), str(folder), entry)
    expected = ", ".join(f"{name} or {name}.index.json" for name in FILES)
    raise InputError(f"{folder}: a folder without weights; expected {expected} in it")


def beside(path: Path) -> dict[str, Any] | None:
    """Return the configuration in a folder, or beside a file that has one of the names in `FILES`; None without one.
    Raises InputError if it is damaged."""
    if path.is_file() and path.name not in FILES:
        return None
    config = (path if path.is_dir() else path.parent) / CONFIG
    return _read_json(config) if config.is_file() else None


def _read_shards(index: Path) -> State:
    """The tensors of all shards. Their names in the index must be of files beside it."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index}: invalid weight_map; expected the shard of every tensor")
    if outside := [place for place in places.values() if Path(place).name != place]:
        raise InputError(f"{index}: invalid shard {outside[0]!r}; expected the name of a file beside the index")
    state = State()
    for shard in dict.fromkeys(places.values()):
        found = read_state(index.with_name(shard))
        tensors = {found.prefix + key: tensor for key, tensor in found.state.items()}
        stated = {key for key, place in places.items() if place == shard}
        if wrong := sorted(stated ^ tensors.keys()):
            raise InputError(f"{index.with_name(shard)}: {listed(wrong)}: in the shard or in the index, but not in "
                             "both")  # fmt: skip
        state |= tensors
    return state


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError naming the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document
