"""Export every row of the atlas as the mixer of a small model in both trunks and every format, and write the run record
and the table of the documentation: ``python benchmarks/export_table.py``.

A row that is in the record already is measured again only with ``--again``, so that a run that was stopped goes on.
``--page`` writes the page from the record and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kernelbank.atlas import ROWS
from kernelbank.exports.export import export
from kernelbank.exports.formats import FORMATS
from kernelbank.files import replace_text
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.testing.small_models import TRUNKS, small_model

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "records" / "exports" / "record.json", ROOT / "docs" / "export-table.md"
RECORD_VERSION = 1
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")
SUFFIXES = (".onnx", ".pt2")
BEFORE = """# Exported rows

Every row of the atlas as the mixer of a small model in both trunks (`kernelbank.testing.small_models`), exported,
loaded again and run. A number is the largest absolute difference of an output of the file from the model's, as a share
of the largest output, for batches of 1 and 3 random images, where the model was traced with 2. A file whose share is
above 1e-4 would be an error and not be kept.

`python benchmarks/export_table.py` measures the table again. This page is written from
[records/exports/record.json](../records/exports/record.json), which states the code and the machine."""


def measured(trunk: str, row: str) -> Iterator[dict[str, Any]]:
    """One entry for each format: the difference, the largest output, and the runtime that ran the file."""
    model = small_model(trunk, row)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            report = export(model, Path(folder) / f"model{suffix}")
            yield {"row": row, "trunk": trunk, "format": report.format, "runtime": report.runtime,
                   "difference": report.difference, "largest": report.largest, "tolerance": report.tolerance,
                   "bytes": report.bytes}  # fmt: skip


def record(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The run record with these entries."""
    return {
        "record_version": RECORD_VERSION,
        "code": asdict(CodeIdentity.here()),
        "machine": asdict(MachineIdentity.here(torch.get_num_threads())),
        "packages": {name: version(name) for name in PACKAGES},
        "entries": entries,
    }


def measure(again: bool) -> None:
    """Measure the rows that the record lacks and write it after each."""
    entries: list[dict[str, Any]] = json.loads(RECORD.read_text())["entries"] if RECORD.exists() and not again else []
    done = {(entry["row"], entry["trunk"]) for entry in entries}
    for row in ROWS:
        for trunk in TRUNKS:
            if (row, trunk) in done:
                continue
            print(row, trunk, file=sys.stderr)
            entries += measured(trunk, row)
            RECORD.parent.mkdir(parents=True, exist_ok=True)
            replace_text(RECORD, json.dumps(record(entries), indent=1) + "\n")


def page(document: dict[str, Any]) -> str:
    """The page of the documentation: a line for each row, a column for each trunk, format and runtime."""
    shares = {
        (entry["row"], entry["trunk"], entry["format"], entry["runtime"]): entry["difference"] / entry["largest"]
        for entry in document["entries"]
    }
    runtimes = list(dict.fromkeys(key[2:] for key in shares))
    columns = [(trunk, *runtime) for trunk in TRUNKS for runtime in runtimes]
    packages = ", ".join(f"{name} {number}" for name, number in document["packages"].items())
    lines = [
        BEFORE, "", f"Versions: {packages}.", "",
        "| row | " + " | ".join(f"{trunk}, {form} in {runtime}" for trunk, form, runtime in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(f"| `{row}` | " + " | ".join(f"{shares[row, *column]:.1e}" for column in columns) + " |" for row in ROWS),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure unless only the page is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure every row again")
    parser.add_argument("--page", action="store_true", help="write the page from the record and measure nothing")
    options = parser.parse_args()
    if not options.page:
        measure(options.again)
    replace_text(PAGE, page(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    assert set(SUFFIXES) <= set(FORMATS)
    main()
