"""``kernelbank evaluate``: the metrics of a run's weights, or of any model, on a split."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich.console import Console
from torch import nn

from kernelbank.data.dataset import Dataset
from kernelbank.errors import InputError, UsageError
from kernelbank.records import RunRecord
from kernelbank.schema import decode
from kernelbank.terminal import print_line, warnings_to
from kernelbank.text import printable
from kernelbank.train.engine import Engine
from kernelbank.train.loop import Metrics, evaluate
from kernelbank.train.model import NEW, InitialWeights, check_model, create
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions, EvaluateOptions
from kernelbank.train.run_weights import read_run_weights
from kernelbank.train.runs import RunFolder
from kernelbank.train.sources import initial_weights, model_spec, open_dataset


def run(options: EvaluateOptions) -> int:
    """Evaluate, print the metrics and return the exit code. Raises InputError."""
    engine, console = Engine(options.hardware), Console(stderr=True)

    def warn(text: str) -> None:
        if engine.main:
            print_line(console, text)

    with warnings_to(warn):
        model, data, label = _open(options, engine)
        split = {"val": data.val, "test": data.test, "train": data.train}[options.split]
        if split is None:
            raise InputError(f"split: {data.name} has no {options.split} split")
        model.to(engine.device)
        metrics = evaluate(model, split, engine=engine, batch_size=options.batch_size)
    engine.close()
    if engine.main:
        _show(options, label, data.name, metrics)
    return 0


def _open(options: EvaluateOptions, engine: Engine) -> tuple[nn.Module, Dataset, str]:
    """The model, the data, and the model in words. Raises InputError."""
    console, folder = Console(stderr=True), RunFolder(Path(options.model))
    if folder.config.exists():
        return _open_run(options, folder, engine, console)
    check_model(options.model)
    weights = initial_weights(options.weights)
    if not weights.given:
        raise UsageError("evaluate", f"{options.model} is not the folder of a run, and as a model it has no weights; "
                                     "expected --initial-checkpoint FILE or --pretrained")  # fmt: skip
    options.source.check("evaluate")
    data = open_dataset(options.model, options.source, options.crop_pct or 0.875, engine, console)
    spec = model_spec(options.model, options.weights, options.source, data, "evaluate")
    model, notes = create(spec, weights, seed=0)
    if new := [note for note in notes if note.endswith(NEW)]:
        raise InputError(f"evaluate: the weights do not have the classes of {data.name}: {new[0]}")
    return model, data, options.model


def _open_run(
    options: EvaluateOptions, folder: RunFolder, engine: Engine, console: Console
) -> tuple[nn.Module, Dataset, str]:
    config = folder.read_config()
    try:
        stated = decode(DataOptions, config["options"].get("source"), "source")
        spec = RunRecord.from_document(config["record"]).model
        crop_pct = decode(Recipe, config["recipe"], "recipe").crop_pct
    except ValueError as error:
        raise InputError(f"run: {folder.config} is damaged: {error}") from None
    default = DataOptions()
    changed = {f.name: value for f in fields(DataOptions)
               if (value := getattr(options.source, f.name)) != getattr(default, f.name)}  # fmt: skip
    source = replace(stated, **changed)
    source.check("evaluate")
    data = open_dataset(spec.name, source, options.crop_pct or crop_pct, engine, console)
    if data.num_classes != spec.num_classes:
        raise InputError(f"evaluate: {folder.path} has {spec.num_classes} classes, {data.name} has {data.num_classes}")
    model, _ = create(spec, InitialWeights(), seed=0)
    weights = read_run_weights(folder, model, options.ema)
    return model, data, f"{folder.path} ({weights})"


def _show(options: EvaluateOptions, label: str, data: str, metrics: Metrics) -> None:
    if options.json:
        print(json.dumps({"model": label, "data": data, "split": options.split, **asdict(metrics)}, indent=1))
        return
    unreadable = f"; {metrics.unreadable} unreadable images are not counted" if metrics.unreadable else ""
    print(printable(f"{label} on {data} {options.split}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f}, "
                    f"loss {metrics.loss:.4f} over {metrics.count} images{unreadable}"))  # fmt: skip
