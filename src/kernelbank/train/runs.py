"""The folder of a run: what it is (run.json), what happened (log.jsonl), where it stands (checkpoint.safetensors), what
came of it (weights.safetensors, ema.safetensors, record.json). Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernelbank.errors import InputError
from kernelbank.files import replace_text
from kernelbank.records import EpochResult, RecordError, RunRecord

RUN_VERSION = 1
OUTPUTS = ("run.json", "checkpoint*.safetensors", "weights.safetensors", "ema.safetensors", "record.json")
"""What a run writes below its folder by renaming."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run by name."""

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
        """What `write_config` wrote. Raises InputError for a folder without a run."""
        try:
            document = json.loads(self.config.read_text(encoding="utf-8"))
            if document.pop("run_version") != RUN_VERSION:
                raise ValueError("another version")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}" if self.config.exists() else "it has no run.json"
            raise InputError(f"run: {self.path} is not the folder of a run ({reason})") from None
        assert isinstance(document, dict)
        return document

    def write_config(self, document: dict[str, Any]) -> None:
        """Keep what the run is."""
        text = json.dumps({"run_version": RUN_VERSION, **document}, indent=1, sort_keys=True)
        replace_text(self.config, text + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """The log's lines, in order; lines that a killed process left half-written are passed over."""
        if not self.log.exists():
            return
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


class Log:
    """Lines of JSON appended to a run's log as they happen."""

    def __init__(self, folder: RunFolder) -> None:
        cut = folder.log.exists() and folder.log.read_bytes()[-1:] not in (b"", b"\n")
        self.file = folder.log.open("a", encoding="utf-8", buffering=1)
        if cut:
            self.file.write("\n")

    def __call__(self, event: str, **values: Any) -> None:
        """Append one event."""
        self.file.write(json.dumps({"event": event, **values}) + "\n")

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


def read_run(path: Path) -> RunRecord:
    """The record of the run in a folder, finished or on its way, or the record in a file. Raises InputError."""
    if path.is_file():
        return RunRecord.load(path)
    folder = RunFolder(path)
    if folder.record.exists():
        return RunRecord.load(folder.record)
    config = folder.read_config()
    told = {event["epoch"]: event for event in folder.events() if event["event"] == "epoch"}
    epochs = []
    for number in sorted(told):
        values = {name: value for name, value in told[number].items() if name not in ("event", "epoch")}
        epochs.append(asdict(EpochResult(**values)))
    document = {**config["record"], "epochs": epochs, "test_loss": None, "test_top1": None, "failure": None}
    try:
        return RunRecord.from_document(document)
    except ValueError as error:
        raise RecordError(f"{path} does not hold a run of this version: {error}") from None
