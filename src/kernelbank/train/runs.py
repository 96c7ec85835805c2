"""The folder of a run: its description (run.json), events (log.jsonl), state (checkpoint.safetensors) and results
(weights.safetensors, ema.safetensors, record.json). Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernelbank.errors import InputError
from kernelbank.files import read_json, regular_file, replace_text
from kernelbank.records import EpochResult, RecordError, RunRecord, check_numbers
from kernelbank.schema import decode

log = logging.getLogger(__name__)
RUN_VERSION = 2
OUTPUTS = ("run.json", "checkpoint*.safetensors", "weights.safetensors", "ema.safetensors", "record.json")
"""The files of a run that are written by renaming."""


_FIELDS: dict[str, type] = {
    "id": str, "model": dict, "start": dict, "recipe": dict, "seed": int, "data": dict, "record": dict, "options": dict,
}  # fmt: skip
"""The fields of run.json that every run has, and their types."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class RunFolder:
    """The files of the run in the folder `path`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def ema(self) -> Path:
        return self.path / "ema.safetensors"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    def read_config(self) -> dict[str, Any]:
        """Return the document of run.json. Raises InputError if there is none, or if it is damaged or of another
        version."""
        if not self.config.exists():
            raise InputError(f"run: {self.path} is not the folder of a run (it has no run.json)")
        try:
            document = read_json(self.config)
            if not isinstance(document, dict):
                raise ValueError(f"expected a JSON object, got {type(document).__name__}")
            version = document.pop("run_version", None)
            if version != RUN_VERSION:
                raise ValueError(f"invalid run_version={version!r}; expected {RUN_VERSION}")
            for name, kind in _FIELDS.items():
                if not isinstance(document.get(name), kind):
                    raise ValueError(f"invalid {name}={_short(document.get(name))}; expected {kind.__name__}")
        except (OSError, ValueError) as error:
            raise InputError(f"run: {self.config} is damaged: {error}") from None
        return document

    def write_config(self, document: dict[str, Any]) -> None:
        """Write the document of run.json."""
        text = json.dumps({"run_version": RUN_VERSION, **document}, indent=1, sort_keys=True)
        replace_text(self.config, text + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the log in order. A line that cannot be read, such as one that a killed process did not
        finish, is skipped with a warning."""
        if not self.log.is_file():
            return
        for number, line in enumerate(self.log.read_bytes().splitlines(), 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                    raise ValueError("not an event")
            except (ValueError, RecursionError, MemoryError):
                log.warning("%s: line %d cannot be read and is skipped", self.log, number)
                continue
            yield event

    def epochs(self) -> dict[int, EpochResult]:
        """Return the epochs in the log by number, from 1 on. An epoch that cannot be read is skipped with a warning."""
        epochs: dict[int, EpochResult] = {}
        for event in self.events():
            if event.pop("event") != "epoch":
                continue
            try:
                if type(number := event.pop("epoch", None)) is not int:
                    raise ValueError(f"invalid epoch={_short(number)}; expected int")
                epochs[number] = decode(EpochResult, event, "epoch")
            except ValueError as error:
                log.warning("%s: an epoch cannot be read and is skipped: %s", self.log, error)
        return epochs


class Log:
    """Appends events to a run's log, a line of JSON each."""

    def __init__(self, folder: RunFolder) -> None:
        try:
            regular_file(folder.log)
        except OSError as error:
            raise InputError(f"run: {error}") from None
        cut = folder.log.exists() and folder.log.read_bytes()[-1:] not in (b"", b"\n")
        self.file = folder.log.open("a", encoding="utf-8", buffering=1)
        if cut:
            self.file.write("\n")

    def __call__(self, event: str, **values: Any) -> None:
        """Append one event."""
        self.file.write(json.dumps({"event": event, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_run(path: Path) -> RunRecord:
    """Return the run record of the run in a folder, finished or in progress, or the run record in a file. Raises
    InputError."""
    folder = RunFolder(path)
    if path.is_file() or folder.record.exists():
        file = path if path.is_file() else folder.record
        return _checked(RunRecord.load(file), file)
    config, epochs = folder.read_config(), folder.epochs()
    try:
        record = RunRecord.from_document(config["record"])
    except ValueError as error:
        raise RecordError(f"{folder.config} does not hold a run of this version: {error}") from None
    return _checked(replace(record, epochs=tuple(epochs[number] for number in sorted(epochs))), folder.log)


def _checked(record: RunRecord, path: Path) -> RunRecord:
    """Return the run record from `path`. Raises RecordError for numbers that cannot be those of a run."""
    try:
        check_numbers(record)
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {error}") from None
    return record
