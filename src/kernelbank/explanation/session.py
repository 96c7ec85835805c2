"""``kernelbank explain``: models and pictures to a page, figures, and a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.explanation.capture import Layers, explain
from kernelbank.explanation.figure import draw_maps, draw_statistics
from kernelbank.explanation.page import MOST_WEIGHTS, Column, Shown, map_size, render
from kernelbank.explanation.picture import Picture, read_picture
from kernelbank.explanation.statistics import documents, statistics, table
from kernelbank.explanation.subject import ExplainedModel, open_model, prefix_names, read_classes, top_classes
from kernelbank.files import replace_text, writable_folder
from kernelbank.text import printable


@dataclass(frozen=True)
class Outputs:
    """The files that are written; None for those that are not."""

    page: Path | None
    png: Path | None
    curves: Path | None

    def paths(self) -> list[Path]:
        """Those that are written."""
        return [path for path in (self.page, self.png, self.curves) if path is not None]

    def check(self, inputs: Sequence[Path]) -> None:
        """Raise InputError where a file cannot be written, or would replace one of `inputs` or another output."""
        taken = {path.resolve() for path in inputs}
        for path in self.paths():
            if path.resolve() in taken:
                raise InputError(f"invalid output {path}: it is an input or another output; expected another name")
            if path.is_dir():
                raise InputError(f"invalid output {path}: it is a folder; expected a file")
            taken.add(path.resolve())
            writable_folder(path.parent)


def run(options: Any) -> int:
    """Explain and print; return the exit code. `options` are those of the verb. Raises InputError and SpecError."""
    outputs = Outputs(*(None if path is None else Path(path) for path in (options.out, options.png, options.curves)))
    classes = None if options.classes is None else read_classes(Path(options.classes))
    words = [(options.model, options.mixer)]
    words += [(options.against, options.against_mixer)] if options.against is not None else []
    models = [
        open_model(word, pretrained=options.pretrained, mixer=mixer, img_size=options.img_size) for word, mixer in words
    ]
    if classes is not None:
        models = [model.with_classes(classes) for model in models]
    pictures = [[read_picture(Path(path), model.size, model.channels) for path in options.images] for model in models]
    layers = _layers(options.layers)
    _check_size([weights_of(*pair, layers) for pair in zip(models, pictures, strict=True)])
    # before minutes of computing, after everything that the user may have mistyped
    outputs.check([Path(path) for path in options.images])
    _say(models, pictures)
    columns = [explained(*pair, layers) for pair in zip(models, pictures, strict=True)]
    _write(outputs, columns, options.position)
    _print(outputs, columns, options.json)
    return 0


def _layers(words: Sequence[str]) -> tuple[int | str, ...] | None:
    """Layers by number or name; all of them without any."""
    return tuple(int(word) if word.lstrip("-").isdigit() else word for word in words) or None


def _say(models: Sequence[ExplainedModel], pictures: Sequence[Sequence[Picture]]) -> None:
    """Say on stderr what was done to the pictures, once where it is the same for both models."""
    lines: dict[tuple[str, str], list[str]] = {}
    for model, shown in zip(models, pictures, strict=True):
        for picture in shown:
            for note in picture.notes:
                lines.setdefault((picture.name, note), []).append(model.label)
    for (name, note), labels in lines.items():
        place = "" if len(labels) == len(models) else f" for {printable(labels[0])}"
        print(f"{printable(name)}{place}: {note}", file=sys.stderr)


def weights_of(subject: ExplainedModel, pictures: Sequence[Picture], layers: Layers | None) -> int:
    """How many weights the maps of a model on the pictures have, from the maps of one position."""
    explanation = explain(subject.model, _image(subject, pictures[0])[None], layers, positions=[0])
    return len(pictures) * sum(map_size(layer) for layer in explanation)


def _check_size(weights: Sequence[int]) -> None:
    """Raise InputError for maps that fill the memory of a machine or of a browser."""
    if sum(weights) > MOST_WEIGHTS:
        raise InputError(
            f"too many weights: {sum(weights) // 10**6} million; expected at most {MOST_WEIGHTS // 10**6} million "
            "(take fewer --layers or pictures, or a smaller --img-size)"
        )


def _image(subject: ExplainedModel, picture: Picture) -> Tensor:
    """The picture as the model takes it, (C, H, W)."""
    return picture.tensor(subject.mean, subject.std, subject.white)


def explained(subject: ExplainedModel, pictures: Sequence[Picture], layers: Layers | None) -> Column:
    """A model on every picture. Progress is shown on a terminal."""
    shown, label = [], printable(subject.label)
    with Console(stderr=True).status(escape(label)) as status:
        for picture in pictures:
            status.update(escape(f"{label} on {printable(picture.name)}"))
            explanation = explain(subject.model, _image(subject, picture)[None], layers=layers)
            classes = _classes(subject, explanation.output)
            shown.append(Shown(picture, explanation.layers, statistics(explanation), classes))
    return Column(label, printable(subject.note), shown, prefix_names(subject.model))


def _classes(subject: ExplainedModel, output: Any) -> list[tuple[str, float]]:
    """The top classes by name; none for a model without a classifier."""
    if not isinstance(output, Tensor) or output.ndim != 2 or not getattr(subject.model, "num_classes", 0):
        return []
    if not bool(torch.isfinite(output).all()):
        raise InputError(f"invalid weights of {subject.label}: its outputs are not finite; expected trained weights")
    return [(printable(subject.classes[index]), share) for index, share in top_classes(output[0])]


def _write(outputs: Outputs, columns: list[Column], position: tuple[float, float]) -> None:
    """Write the files that were asked for, each whole or not at all."""
    if outputs.page is not None:
        names = ", ".join(shown.picture.name for shown in columns[0].shown)
        replace_text(outputs.page, render(printable(f"{columns[0].label} on {names}"), columns))
    if outputs.png is not None:
        draw_maps(columns, position, outputs.png)
    if outputs.curves is not None:
        draw_statistics(columns, outputs.curves)


def _print(outputs: Outputs, columns: list[Column], as_json: bool) -> None:
    """The statistics as a table or as JSON, and what was written."""
    if as_json:
        document = {
            "files": [str(path) for path in outputs.paths()],
            "models": [
                {"model": column.label, "weights": column.note, "pictures": [
                    {"picture": shown.picture.name, "done": list(shown.picture.notes),
                     "classes": [{"class": name, "probability": share} for name, share in shown.classes],
                     "statistics": documents(shown.statistics)}
                    for shown in column.shown
                ]}
                for column in columns
            ],
        }  # fmt: skip
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    for column in columns:
        for shown in column.shown:
            best = f"; {shown.classes[0][0]}, {100 * shown.classes[0][1]:.1f} %" if shown.classes else ""
            print(f"{column.label} ({column.note}) on {printable(shown.picture.name)}{best}")
            print(f"{table(shown.statistics)}\n")
    for path in outputs.paths():
        print(f"wrote {printable(path)}, {path.stat().st_size / 1e6:.2f} MB")
