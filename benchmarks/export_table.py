"""Export every row of the atlas as the mixer of a small model in both trunks and both formats, and write the run record
and the table of the documentation: ``python benchmarks/export_table.py``.

A run that was stopped goes on, unless the code has changed since. ``--page`` writes the page from the record and
measures nothing.
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
from torch import nn

from kernelbank.atlas import ROWS
from kernelbank.errors import InputError
from kernelbank.exports.export import TOLERANCES, export
from kernelbank.exports.runtimes import RUNTIMES, open_file
from kernelbank.exports.shapes import ANY_BATCH
from kernelbank.files import replace_text
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.testing.small_models import IMAGE, TRUNKS, small_model

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "records" / "exports" / "record.json", ROOT / "docs" / "export-table.md"
RECORD_VERSION = 1
SUFFIXES = (".onnx", ".pt2")
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")
BEFORE = """# Exported rows

Every row of the atlas as the mixer of a small model in both trunks (`kernelbank.testing.small_models`), exported,
loaded again and run. A number is the largest absolute difference of an output of the file from the model's, as a share
of the largest output, for batches of 1 and 3 random images, where the model was traced with 2. A file whose share is
above 1e-4 would be an error and not be kept.

`python benchmarks/export_table.py` measures the table again. This page is written from
[records/exports/record.json](../records/exports/record.json), which states the code and the machine."""


def measured(trunk: str, row: str) -> Iterator[dict[str, Any]]:
    """One entry for each format and runtime: the largest difference of an output, the largest output and the tolerance
    for the first as a share of the second. Raises InputError for a difference above the tolerance."""
    model = small_model(trunk, row)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            report = export(model, Path(folder) / f"model{suffix}")
            entry = {"row": row, "trunk": trunk, "format": report.format, "tolerance": report.tolerance}
            yield entry | {"runtime": report.runtime, "difference": report.difference, "largest": report.largest}
        yield entry_of_openvino(model, Path(folder) / "model.onnx") | {"row": row, "trunk": trunk}


def entry_of_openvino(model: nn.Module, path: Path) -> dict[str, Any]:
    """What OpenVINO gives for an ONNX file of the model, on other images than the export compared."""
    run = open_file(RUNTIMES["OpenVINO"], path)
    difference, largest, tolerance = 0.0, 0.0, TOLERANCES[torch.float32]
    for batch in ANY_BATCH:
        images = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            outputs = model(images)
        difference = max(difference, float((run(images) - outputs).abs().max()))
        largest = max(largest, float(outputs.abs().max()))
    if not difference <= tolerance * largest:
        raise InputError(f"invalid outputs of OpenVINO: they differ by {difference:.1e} of {largest:.1e}; expected at "
                         f"most {tolerance:.0e} of that")  # fmt: skip
    return {"format": "ONNX", "runtime": "OpenVINO", "difference": difference, "largest": largest,
            "tolerance": tolerance}  # fmt: skip


def record(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The run record with these entries."""
    return {
        "record_version": RECORD_VERSION,
        "code": asdict(CodeIdentity.here()),
        "machine": asdict(MachineIdentity.here(torch.get_num_threads())),
        "packages": {name: version(name) for name in PACKAGES},
        "entries": entries,
    }


def measure() -> None:
    """Measure what the record of this code lacks and write it after each model. Exits with the errors if any."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entries: list[dict[str, Any]] = known["entries"] if known.get("code") == asdict(CodeIdentity.here()) else []
    failures: list[str] = []
    done = {(entry["row"], entry["trunk"]) for entry in entries}
    for row in ROWS:
        for trunk in TRUNKS:
            if (row, trunk) in done:
                continue
            print(row, trunk, file=sys.stderr)
            try:
                entries += list(measured(trunk, row))
            except InputError as error:
                failures.append(f"{row}, {trunk}: {error}")
                print(failures[-1], file=sys.stderr)
                continue
            RECORD.parent.mkdir(parents=True, exist_ok=True)
            replace_text(RECORD, json.dumps(record(entries), indent=1) + "\n")
    if failures:
        sys.exit("\n".join(failures))


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
    parser.add_argument("--page", action="store_true", help="write the page from the record and measure nothing")
    options = parser.parse_args()
    if not options.page:
        measure()
    replace_text(PAGE, page(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
