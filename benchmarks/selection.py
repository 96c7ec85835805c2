"""Measure which kernels trained models select, layer by layer: section 4.3 of the paper remarks that softmax prefers
kernels close in cosine similarity to the input.

``python benchmarks/selection.py OUT.json RUN RUN ... --images 256`` takes the folders of runs of ``kernelbank train``,
one for each activation, and measures the first validation images: the rank correlation of weight and cosine similarity,
the effective number of kernels, the sparsity and the other statistics of docs/explain.md, of every head. It prints a
table of means over heads, and writes all heads with the run record of each run, the code and the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kernelbank.data.dataset import UNREADABLE, Dataset
from kernelbank.data.order import Part, in_order
from kernelbank.errors import InputError
from kernelbank.explanation.capture import explain
from kernelbank.explanation.statistics import HeadStatistics, documents, statistics, table
from kernelbank.explanation.subject import ExplainedModel, open_model
from kernelbank.files import replace_text
from kernelbank.records import CodeIdentity, MachineIdentity, RunRecord
from kernelbank.schema import decode, encode
from kernelbank.text import printable
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions
from kernelbank.train.runs import RunFolder
from kernelbank.train.sources import open_dataset

BATCH = 16
STATISTICS = tuple(field.name for field in fields(HeadStatistics) if field.name not in ("layer", "head"))


def measured(model: ExplainedModel, data: Dataset, images: int) -> tuple[list[HeadStatistics], int]:
    """The statistics of every head, means over the first `images` validation images, and how many could be read.

    Raises:
        InputError: If none can be read, or a statistic is not finite, as with weights that are not.
    """
    found, counts = list[list[HeadStatistics]](), list[int]()
    shares = list(in_order(min(images, len(data.val)), BATCH, Part()))
    for pictures, labels in data.val.batches(shares, None):
        readable = pictures[labels != UNREADABLE]
        if len(readable):
            found.append(statistics(explain(model.model, readable)))
            counts.append(len(readable))
    if not counts:
        raise InputError(f"data: none of the first {images} validation images of {data.name} can be read")
    return [_mean(heads, counts) for heads in zip(*found, strict=True)], sum(counts)


def _mean(heads: Sequence[HeadStatistics], counts: Sequence[int]) -> HeadStatistics:
    """The mean of a head's statistics over batches of `counts` images."""
    means: dict[str, float | None] = {}
    for name in STATISTICS:
        values = [getattr(head, name) for head in heads]
        known = None not in values
        total = sum(value * count for value, count in zip(values, counts, strict=True)) if known else None
        if total is not None and not math.isfinite(total):
            raise InputError(f"invalid weights: the {name} of {heads[0].layer} is {total}; expected trained weights")
        means[name] = None if total is None else total / sum(counts)
    return HeadStatistics(layer=heads[0].layer, head=heads[0].head, **means)


def of_run(word: str, images: int) -> dict[str, Any]:
    """The statistics of a run, with its record. Raises InputError."""
    folder = RunFolder(Path(word))
    config = folder.read_config()
    record = RunRecord.load(folder.record)
    try:
        source = decode(DataOptions, config["options"].get("source"), "source")
        crop_pct = decode(Recipe, config["recipe"], "recipe").crop_pct
    except ValueError as error:
        raise InputError(f"run: {folder.config} is damaged: {error}") from None
    data = open_dataset(record.model.name, source, crop_pct, Engine(Hardware(device="cpu")), Console(stderr=True))
    if data.identity != record.data:
        raise InputError(f"run: {word} was trained on {record.data}; expected the same data, not {data.identity}")
    heads, count = measured(open_model(word, pretrained=False, mixer=None, img_size=None), data, images)
    print(f"{printable(word)}: {printable(record.mixer)}, {count} images\n{table(heads)}\n")
    return {"row": record.row, "images": count, "heads": documents(heads), "record": record.to_document()}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Which kernels do trained models select, layer by layer?")
    parser.add_argument("out", type=Path, help="the JSON file that is written")
    parser.add_argument("runs", nargs="+", help="folders of runs of kernelbank train")
    parser.add_argument("--images", type=int, default=256, help="validation images (default: 256)")
    found = parser.parse_args(words)
    if found.images < 1:
        parser.error(f"invalid --images={found.images}; expected a whole number >= 1")
    return found


def lines(document: dict[str, Any]) -> Iterator[str]:
    """A Markdown table: a row for each layer, a column for each run, with rank correlation, effective number of the
    kernels seen, and sparsity."""
    runs = document["runs"]
    yield "| layer | " + " | ".join(f"`{run['record']['model']['mixer']}`" for run in runs) + " |"
    yield "|---|" + "---|" * len(runs)
    for layer in dict.fromkeys(head["layer"] for run in runs for head in run["heads"]):
        cells = []
        for run in runs:
            own = [head for head in run["heads"] if head["layer"] == layer]
            cells.append(", ".join(_shown(own, name) for name in ("rank_correlation", "effective", "sparsity")))
        yield f"| {layer} | " + " | ".join(cells) + " |"


def _shown(heads: list[dict[str, Any]], name: str) -> str:
    values = [head[name] for head in heads if head[name] is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def main(words: Sequence[str]) -> int:
    """Measure the runs, write the file and print the table."""
    options = arguments(words)
    torch.set_num_threads(1)
    document = {
        "runs": [of_run(word, options.images) for word in options.runs],
        "machine": asdict(MachineIdentity.here(1)), "code": asdict(CodeIdentity.here()),
    }  # fmt: skip
    replace_text(options.out, json.dumps(encode(document), indent=1, allow_nan=False) + "\n")
    print("\n".join(lines(document)))
    print("mean over heads of rank correlation with the cosine similarity, effective number of kernels, sparsity")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"selection: error: {error}", file=sys.stderr)
        sys.exit(2)
