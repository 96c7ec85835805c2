"""``kernelbank explain``: which kernels a model selects on your own pictures, as a page to look at."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require

FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show which kernels every position of a picture selects, layer by layer and head by head: one HTML page that works
    offline, and a table of statistics."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model of ours or of timm by name, the folder of a run, or a file that kernelbank wrote."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """Pictures: .jpg, .png, .webp and others."""
    against: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """A second model beside the first."""
    pretrained: bool = False
    """Use timm's published weights for models given by name, instead of random ones."""
    mixer: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Specs that replace those of the first model, or cells to change, such as "activation=relu,count"."""
    against_mixer: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The same for the second model."""
    img_size: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="H W")] = None
    """The height and width in pixels of the input of the models. Default: the model's own."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Names of the classes, one per line, or a folder with a folder per class. Default: ImageNet's for 1000 classes,
    else numbers."""
    layers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER ...")] = ()
    """Layers by number, from 0, or by name. Default: all of them."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = "explain.html"
    """The file for the page, .html, or None to write no page."""
    png: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A figure of one position's kernels over depth: .png, .svg or .pdf."""
    position: Annotated[tuple[float, float], tyro.conf.arg(metavar="Y X")] = (0.5, 0.5)
    """The position of that figure, as fractions of the picture's height and width."""
    curves: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A figure of the statistics over depth: .png, .svg or .pdf."""
    json: bool = False
    """Print the statistics of every head as JSON."""

    def check(self) -> None:
        """Raise UsageError for options that cannot be used."""
        if not self.images:
            raise UsageError("explain", "a picture is missing; expected IMAGE ...")
        if self.against_mixer is not None and self.against is None:
            raise UsageError("explain", "invalid --against-mixer without --against; expected both")
        if self.out is not None and Path(self.out).suffix not in (".html", ".htm"):
            raise UsageError("explain", f"invalid --out={self.out!r}; expected a name in .html")
        for name in ("png", "curves"):
            value = getattr(self, name)
            if value is not None and Path(value).suffix not in FIGURES:
                raise UsageError("explain", f"invalid --{name}={value!r}; expected a name in {', '.join(FIGURES)}")
        if self.img_size is not None and min(self.img_size) < 1:
            raise UsageError("explain", f"invalid --img-size={self.img_size}; expected whole numbers >= 1")
        if not all(0 <= share <= 1 for share in self.position):
            raise UsageError("explain", f"invalid --position={self.position}; expected two shares from 0 to 1")


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError and SpecError, and leaves no file half-written."""
    options = read(argv)
    require("explain", "train,report", "timm", "safetensors", "sklearn", "accelerate", "jinja2", "matplotlib")
    code: int = import_module("kernelbank.explanation.session").run(options)  # torch takes seconds to import
    return code


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "explain", argv)
    options.check()
    return options
