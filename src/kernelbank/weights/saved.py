"""Our own files: a state under our names, and in the metadata what it takes to build the backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.nn.backbone import Backbone
from kernelbank.spec import SpecError
from kernelbank.weights.architecture import Architecture
from kernelbank.weights.file import read_state, write_state
from kernelbank.weights.from_timm import CLASSES, backbone_of

ENTRY, VERSION = "kernelbank", 1


@dataclass(frozen=True)
class Description:
    """A backbone without its weights: its trunk, its records as text, and the name of the model it came from."""

    architecture: Architecture
    mixer: str
    mlp: str
    source: str

    def metadata(self) -> dict[str, str]:
        """As an entry of a safetensors file."""
        architecture = self.architecture
        document = {
            "version": VERSION, "mixer": self.mixer, "mlp": self.mlp, "source": self.source,
            "family": architecture.family, "pad": architecture.pad, "norm_eps": architecture.norm_eps,
            "arguments": dict(architecture.arguments),
        }  # fmt: skip
        return {ENTRY: json.dumps(document)}

    @staticmethod
    def read(metadata: Mapping[str, str], what: str) -> Description | None:
        """From the metadata of a file; None where it is not ours. Raises InputError for an entry that is damaged."""
        if ENTRY not in metadata:
            return None
        try:
            document: dict[str, Any] = json.loads(metadata[ENTRY])
            if document["version"] != VERSION:
                raise InputError(f"{what}: written by another version: {document['version']}; legal: {VERSION}")
            if document["family"] not in CLASSES:
                raise InputError(f"{what}: unknown family {document['family']!r}; legal: {', '.join(CLASSES)}")
            if not all(isinstance(document[name], str) for name in ("mixer", "mlp", "source", "pad")):
                raise TypeError("mixer, mlp, source and pad are texts")
            arguments = {
                name: tuple(value) if name in ("img_size", "patch_size") else value
                for name, value in document["arguments"].items()
            }
            architecture = Architecture(
                family=document["family"], arguments=arguments, norm_eps=float(document["norm_eps"]),
                pad=document["pad"],
            )  # fmt: skip
            return Description(architecture, document["mixer"], document["mlp"], document["source"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{what}: its kernelbank entry is damaged: {error}") from None

    def build(self, state: Mapping[str, Tensor]) -> Backbone:
        """The backbone with `state` under our names, in eval mode. Raises InputError as `cover`."""
        try:
            return backbone_of(self.architecture, state, (self.mixer, self.mlp))
        except (TypeError, ValueError) as error:
            if isinstance(error, (InputError, SpecError)):
                raise
            raise InputError(f"the kernelbank entry is damaged: {error}") from None


def load(path: str | Path) -> Backbone:
    """The backbone in a safetensors file that `kernelbank convert` or `save` wrote, in eval mode.

    Raises InputError for another file, and for tensors that are missing, left over or of another shape.
    """
    state, metadata = read_state(Path(path))
    description = Description.read(metadata, str(path))
    if description is None:
        raise InputError(f"{path}: no kernelbank entry in its metadata; write it with kernelbank convert")
    return description.build(state)


def save(path: str | Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a file for `load`, whole or not at all. Raises InputError where it cannot be written."""
    write_state(Path(path), state, description.metadata())
