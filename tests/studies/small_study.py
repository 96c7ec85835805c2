"""A study of two short runs on the digits, and its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kernelbank.cli import main
from kernelbank.records import RunRecord

WORDS = ["study", "softmax", "--models", "plain", "--rows", "softmax", "relu", "--seeds", "0", "--epochs", "2"]


def study(folder: Path, *words: str) -> int:
    return main([*WORDS, "--out", str(folder), "--jobs", "1", *words])


def numbers(folder: Path) -> dict[str, object]:
    """Every record by name, without what may differ from one execution to the next."""
    found: dict[str, object] = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = RunRecord.load(path)
        epochs = tuple(replace(epoch, seconds=0.0, waited=None) for epoch in record.epochs)
        found[path.name] = replace(record, epochs=epochs, code=None, machine=None)  # type: ignore[arg-type]
    return found
