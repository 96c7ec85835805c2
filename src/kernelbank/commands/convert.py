"""``kernelbank convert``: a checkpoint of another library as ours or another's, proved on the same images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Annotated

import tyro
from rich.console import Console

from kernelbank.commands.options import default_text, read_options
from kernelbank.errors import UsageError, require

OURS = "kernelbank"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint of timm, DINOv2, microsoft Swin, torchvision, Hugging Face or mmpretrain into ours, or each
    other's. Every tensor is accounted for, the way back is bit-equal, and the same random images go through both
    models where their libraries are installed."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The name of a timm model (its pretrained weights), a file: .safetensors, .pth, .pt, .bin, or a folder with
    config.json and model.safetensors or its shards."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The file to write: .safetensors."""
    to: Annotated[str, tyro.conf.arg(metavar="DIALECT")] = OURS
    """The library whose names are written: kernelbank, timm, facebook, facebook-registers, microsoft, torchvision,
    huggingface, huggingface4, huggingface-dinov2, huggingface-dinov2-registers, huggingface-clip,
    huggingface-siglip, mmpretrain, mmpretrain-linear; backbones alone as huggingface-bare, huggingface4-bare,
    huggingface-clip-bare, mmpretrain-bare."""
    model: Annotated[str | None, default_text("TIMM_NAME", "inferred from the shapes")] = None
    """The timm model that a file belongs to."""
    entry: Annotated[str | None, default_text("NAME", "averaged weights before others")] = None
    """The entry of a training checkpoint to take, such as state_dict, where it holds several."""
    img_size: Annotated[tuple[int, int] | None, default_text("H W", "inferred from the shapes")] = None
    """The height and width of the model's images in pixels."""
    mixer: Annotated[str | None, default_text("TEXT", "the specs that the model has")] = None
    """Specs to put in their place, or cells to change, such as "activation=relu,count"."""
    untrained: bool = False
    """Take the initial weights of a timm model, without fetching any."""
    require_proof: bool = False
    """Exit with code 2, and write nothing, unless the outputs were compared with a model that was stated."""
    json: bool = False
    """Print the outcome as JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError, and leaves no file, where anything does not fit."""
    options = read(argv)
    require("convert", "train", "timm", "safetensors")
    request = {name: value for name, value in asdict(options).items() if name != "json"}
    transcript = import_module("kernelbank.weights.transcript")  # torch and timm take seconds to import
    print(transcript.convert(request, Console(stderr=True).status, options.json))
    return 0


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "convert", argv)
    if options.mixer is not None and options.to != OURS:
        raise UsageError("convert", f"invalid --mixer={options.mixer!r} with --to {options.to}; expected --to {OURS}, "
                                    "since no other dialect holds specs")  # fmt: skip
    if options.untrained and options.model is not None:
        raise UsageError("convert", "invalid --untrained with --model; expected --model with a file as SRC alone")
    return options
