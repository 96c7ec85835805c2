"""``kernelbank export``: a model to a file, and what was compared."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.markup import escape

from kernelbank.errors import InputError
from kernelbank.explanation.subject import ExplainedModel, open_model, read_classes
from kernelbank.exports.export import ExportReport, check_path, export
from kernelbank.exports.preprocessing import Preprocessing
from kernelbank.model import TimmTrunk
from kernelbank.nn.build import build
from kernelbank.schema import decode
from kernelbank.text import printable
from kernelbank.train.model import described
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
    if options.dynamic_size:
        found = with_dynamic_size(found)
    with Console(stderr=True).status(escape(printable(found.label))) as status:
        report = export(
            found.model, path, preprocessing=preprocessing(found, options.model), half=options.half,
            opset=options.opset, form=options.form, batch=options.batch, dynamic_size=options.dynamic_size,
            overwrite=options.overwrite,
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
    inputs = report.inputs
    batches = " and ".join(map(str, inputs.batches))
    what = f"a batch of {batches}" if len(inputs.batches) == 1 else f"batches of {batches}"
    sizes = " of " + ", ".join(f"{height} x {width}" for height, width in inputs.sizes) if inputs.dynamic_size else ""
    form = "" if report.form == "products" else ", attention as grouped convolutions"
    return (
        f"wrote {printable(report.path)}: {report.format}, {report.dtype}, {report.bytes / 1e6:.2f} MB, "
        f"{inputs}{form}\n"
        f"loaded again in {report.runtime}: outputs for {what} random images{sizes} differ by at most "
        f"{report.difference:.1e} from the model's, which reach {report.largest:.2g} "
        f"(tolerance {report.tolerance:.0e} of that)"
    )


def with_dynamic_size(found: ExplainedModel) -> ExplainedModel:
    """The model with the same weights, built to take images of any size. Raises InputError for a file that does not
    state how to build it, and for a stock model whose trunk has no such option."""
    if found.spec is None:
        raise InputError(f"invalid --dynamic-size for {found.label}, whose file does not describe the model; expected "
                         "a name, a run, or a file of kernelbank convert")  # fmt: skip
    spec = replace(described(found.spec, found.model), img_size=found.size)
    trunk: Any = spec.trunk
    if isinstance(trunk, TimmTrunk):
        trunk = replace(trunk, arguments={**trunk.arguments, "dynamic_img_size": True})
    else:
        trunk = replace(trunk, dynamic_img_size=True)
    model = build(replace(spec, trunk=trunk))
    model.load_state_dict(found.model.state_dict())
    return replace(found, model=model.eval())


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
