"""``kernelbank export``: a model to a file, and what was compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.markup import escape

from kernelbank.errors import InputError
from kernelbank.explanation.subject import ExplainedModel, open_model, read_classes
from kernelbank.exports.export import ExportReport, check_path, export
from kernelbank.exports.preprocessing import Preprocessing
from kernelbank.schema import decode
from kernelbank.text import printable
from kernelbank.train.recipe import Recipe
from kernelbank.train.runs import RunFolder
from kernelbank.weights.file import SUFFIXES, read_model_file
from kernelbank.zoo import NAMED

EVALUATED = ("bicubic", 0.875)
"""The interpolation and the centre crop of ``kernelbank evaluate``."""


def run(options: Any) -> int:
    """Export and print; return the exit code. `options` are those of the verb. Raises InputError and SpecError."""
    path = Path(options.out)
    check_path(path, options.opset, options.overwrite)  # before a model is built or fetched
    classes = None if options.classes is None else read_classes(Path(options.classes))
    found = open_model(options.model, pretrained=options.pretrained, mixer=options.mixer, img_size=options.img_size)
    if classes is not None:
        found = found.with_classes(classes)
    with Console(stderr=True).status(escape(printable(found.label))) as status:
        report = export(
            found.model, path, preprocessing=preprocessing(found, options.model), half=options.half,
            opset=options.opset, overwrite=options.overwrite,
            progress=lambda step: status.update(escape(f"{printable(found.label)}: {step}")),
        )  # fmt: skip
    if options.json:
        document = {"model": found.label, "weights": found.note, **asdict(report), "path": str(path)}
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        print(f"{printable(found.label)} ({printable(found.note)})\n{lines(report)}")
    return 0


def lines(report: ExportReport) -> str:
    """What was written and compared, in two lines."""
    batches = " and ".join(map(str, report.batches))
    return (
        f"wrote {printable(report.path)}: {report.format}, {report.dtype}, {report.bytes / 1e6:.2f} MB, any batch\n"
        f"loaded again in {report.runtime}: outputs for batches of {batches} random images differ by at most "
        f"{report.difference:.1e} from the model's, which reach {report.largest:.2g} "
        f"(tolerance {report.tolerance:.0e} of that)"
    )


def preprocessing(found: ExplainedModel, word: str) -> Preprocessing:
    """The preprocessing of the model that `word` names: the interpolation and the crop are those of timm's
    configuration of its name, of the recipe of a run, or else those of ``kernelbank evaluate``."""
    interpolation, crop_pct = _resampling(word)
    return Preprocessing(
        input_size=(found.channels, *found.size), mean=found.mean, std=found.std, white=found.white,
        interpolation=interpolation, crop_pct=crop_pct, class_names=found.classes,
    )  # fmt: skip


def _resampling(word: str) -> tuple[str, float]:
    path = Path(word)
    if RunFolder(path).config.exists():
        try:
            recipe = decode(Recipe, RunFolder(path).read_config()["recipe"], "recipe")
        except ValueError as error:
            raise InputError(f"run: {RunFolder(path).config} is damaged: {error}") from None
        return EVALUATED[0], recipe.crop_pct
    if path.suffix in SUFFIXES or path.is_file():
        spec = read_model_file(path)[1]
        word = "" if spec is None else spec.name
    config = None if word in NAMED or not timm.is_model(word.partition(".")[0]) else timm.get_pretrained_cfg(word)
    return EVALUATED if config is None else (str(config.interpolation), float(config.crop_pct))
