"""``kernelbank export``: a model as a file that runs without this library."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import tyro

from kernelbank.commands.options import default_text, read_options
from kernelbank.errors import UsageError, require


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model to an ONNX file or a program of torch.export that takes batches of any size. The file is loaded
    again and compared with the model; it is kept only if its outputs are those of the model."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model of ours or of timm by name, the folder of a run, or a file that kernelbank wrote."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write: .onnx (ONNX), .pt2 (torch.export) or .aoti.pt2 (AOTInductor, compiled for this machine)."""
    pretrained: bool = False
    """Take timm's published weights for a model given by name; else they are random."""
    mixer: Annotated[str | None, default_text("TEXT", "the specs that the model has")] = None
    """Specs to put in their place, or cells to change, such as "activation=relu,count"."""
    img_size: Annotated[tuple[int, int] | None, default_text("H W", "the model's own")] = None
    """The height and width of the images in pixels."""
    half: Annotated[Literal["float16", "bfloat16"] | None, default_text("DTYPE", "the dtype of the weights")] = None
    """Store the weights and compute in half precision: float16 or bfloat16. Input and output stay float32."""
    opset: Annotated[int | None, default_text("N", "that of torch.onnx")] = None
    """The version of ONNX's operator set."""
    form: Literal["products", "conv"] = "products"
    """How mixers are written: attention by matrix products, or as grouped convolutions (conv; it needs --batch)."""
    batch: Annotated[int | None, default_text("N", "any")] = None
    """The number of images that the file takes."""
    dynamic_size: bool = False
    """Take images of any size, in multiples of the pixels that a position of the last stage covers."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Names of the classes, one per line, or a folder with a folder per class. Default: ImageNet's for 1000 classes,
    else numbers."""
    overwrite: bool = False
    """Replace a file that exists."""
    json: bool = False
    """Print the outcome as JSON."""

    def check(self) -> None:
        """Raise UsageError for a value that no model takes."""
        if self.img_size is not None and min(self.img_size) < 1:
            raise UsageError("export", f"invalid --img-size={self.img_size}; expected whole numbers >= 1")
        if self.batch is not None and self.batch < 1:
            raise UsageError("export", f"invalid --batch={self.batch}; expected a whole number >= 1")


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError and SpecError, and leaves no file half-written."""
    options = read(argv)
    require("export", "train,export", "timm", "safetensors", "sklearn", "accelerate")
    code: int = import_module("kernelbank.exports.session").run(options)  # torch takes seconds to import
    return code


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "export", argv)
    options.check()
    return options
