"""``kernelbank convert``: a checkpoint of another library as ours or another's, proved on the same images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from rich.console import Console

from kernelbank.commands.options import read_options
from kernelbank.errors import InputError, UsageError, require

if TYPE_CHECKING:
    from kernelbank.nn.edit.replace import Replaced
    from kernelbank.weights.architecture import Architecture, Family
    from kernelbank.weights.convert import Source
    from kernelbank.weights.dialects import Dialect
    from kernelbank.weights.keymap import State
    from kernelbank.weights.proof import Model, Proof
    from kernelbank.weights.saved import Description

OURS = "kernelbank"


def _shown(metavar: str, default: str) -> Any:
    """How an option that is worked out later is shown in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a checkpoint of timm, microsoft Swin, torchvision, Hugging Face or mmpretrain into ours, or into each
    other's. Every tensor is accounted for, the way back is bit-equal, and the same random images go through both
    models where their libraries are installed."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A timm model name (its pretrained weights), or a file: .safetensors, .pth, .pt, .bin."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The file to write: .safetensors."""
    to: Annotated[str, tyro.conf.arg(metavar="DIALECT")] = OURS
    """Whose names to write: kernelbank, timm, facebook, microsoft, torchvision, huggingface, huggingface4, mmpretrain,
    mmpretrain-linear; backbones alone as huggingface-bare, huggingface4-bare, mmpretrain-bare."""
    model: Annotated[str | None, _shown("TIMM_NAME", "read off the shapes")] = None
    """The timm model that a file belongs to."""
    img_size: Annotated[tuple[int, int] | None, _shown("H W", "read off the shapes")] = None
    """The image of the model in pixels."""
    mixer: Annotated[str | None, _shown("TEXT", "the records that the model has")] = None
    """Records to put in their place, or cells to change, such as "activation=relu,count"."""
    untrained: bool = False
    """Take a timm model as it is initialised, without fetching weights."""
    require_proof: bool = False
    """Exit with code 2, and write nothing, where a library that the proof needs is not installed."""
    json: bool = False
    """Print the outcome as JSON."""


@dataclass(frozen=True)
class Outcome:
    """What was converted, for the transcript and as JSON."""

    source: Source
    to: Dialect
    state: State
    proof: Proof | str
    written: Path
    description: Description | None
    replaced: Replaced | None

    def lines(self) -> list[str]:
        """The transcript."""
        source, written = self.source, f"{self.written}, {self.written.stat().st_size / 1e6:.1f} MB"
        lines = [f"read: {_described(source)}"]
        lines += [f"assumed: {', '.join(source.architecture.assumed)}"] * bool(source.architecture.assumed)
        lines += [f"dropped: {key}: {reason}" for key, reason in source.dropped.items()]
        lines += [f"keys: {_counted(source)} -> {len(self.state)} of {self.to.name}, none left over",
                  f"back: {len(source.state) - len(source.dropped)} tensors bit-equal", self.proof_line]  # fmt: skip
        if self.description is not None:
            lines += [f"records: {self.description.mixer}; mlp {self.description.mlp}"]
        return [*lines, *([str(self.replaced)] if self.replaced else []), f"wrote: {written}"]

    @property
    def proof_line(self) -> str:
        """``proved: max |difference| 3.1e-07 on 2 random images through timm and kernelbank``."""
        if isinstance(self.proof, str):
            return f"not proved: {self.proof}"
        through = f"{self.source.dialect.library} and {self.to.library}"
        return (f"proved: max |difference| {self.proof.difference:.1e} on {self.proof.images} random images through "
                f"{through}, outputs up to {self.proof.scale:.1e}")  # fmt: skip

    def document(self) -> dict[str, Any]:
        """As JSON."""
        proof = {"not_proved": self.proof} if isinstance(self.proof, str) else {
            "difference": self.proof.difference, "scale": self.proof.scale, "images": self.proof.images,
        }  # fmt: skip
        return {
            "from": self.source.dialect.name, "to": self.to.name, "family": self.source.dialect.family,
            "tensors": {
                "source": len(self.source.state), "derived": len(self.source.derived), "target": len(self.state),
            },
            "dropped": dict(self.source.dropped), "assumed": list(self.source.architecture.assumed),
            "back": "bit-equal", "proof": proof, "written": str(self.written),
            "records": None if self.description is None else {
                "mixer": self.description.mixer, "mlp": self.description.mlp,
            },
            "carried": None if self.replaced is None else [
                {"tensor": line.name, "verdict": line.verdict, "how": line.how} for line in self.replaced.lines
            ],
        }  # fmt: skip


def _described(source: Source) -> str:
    architecture = source.architecture
    arguments, image = architecture.arguments, " x ".join(map(str, architecture.image))
    return (f"{source.dialect.name}, {architecture.family}, {' + '.join(map(str, architecture.depths))} blocks from "
            f"{arguments['embed_dim']} channels, heads {arguments['num_heads']}, patches of "
            f"{' x '.join(map(str, arguments['patch_size']))}, images of {image}")  # fmt: skip


def _counted(source: Source) -> str:
    text = f"{len(source.state)} tensors of {source.dialect.name}"
    return text + (f" ({len(source.derived)} of them buffers that the architecture gives)" if source.derived else "")


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises InputError, and leaves no file, where anything does not fit."""
    options = read_options(Options, "convert", argv)
    require("convert", "train", "timm", "safetensors")
    outcome = run(options)
    if options.json:
        print(json.dumps(outcome.document(), indent=2, allow_nan=False))
    else:
        print("\n".join(outcome.lines()))
    return 0


def run(options: Options) -> Outcome:
    """Read, convert, prove and write. Raises InputError and SpecError, and leaves no file, where anything fails."""
    # torch and timm take seconds to import: only once the options are known to be good
    _check(options)
    from kernelbank.weights.convert import differing, write  # noqa: PLC0415
    from kernelbank.weights.dialects import known, named  # noqa: PLC0415
    from kernelbank.weights.file import check_destination, write_state  # noqa: PLC0415
    from kernelbank.weights.keymap import listed  # noqa: PLC0415
    from kernelbank.weights.saved import save  # noqa: PLC0415

    known(options.to)
    check_destination(Path(options.dst))
    with _telling(f"reading {options.src}"):
        start = _start(options)
    source = start.source
    to = named(options.to, source.dialect.family)
    description = start.description if to.name == OURS else None
    if start.only_ours and to.name != OURS:
        assert start.description is not None
        raise InputError(f"{options.src}: mixer={start.description.mixer!r}, mlp={start.description.mlp!r} have no "
                         f"place in {to.name}; legal: --to {OURS}")  # fmt: skip
    state = dict(source.state) if start.only_ours else write(source, to)
    if not start.only_ours and (wrong := differing(source, state, to)):
        raise InputError(f"the way back is not bit-equal: {listed(wrong)}")
    with _telling("running the same images through both models"):
        proof = _prove(start, to, state)
    if isinstance(proof, str) and options.require_proof:
        raise InputError(f"not proved: {proof} (--require-proof)")
    replaced = None
    if description is not None and options.mixer is not None:
        description, state, replaced = _replace(description, state, options.mixer)
    if description is None:
        write_state(Path(options.dst), state, {"dialect": to.name, "source": options.src})
    else:
        save(options.dst, state, description)
    return Outcome(source, to, state, proof, Path(options.dst), description, replaced)


def _check(options: Options) -> None:
    """Raises UsageError for options that do not go together."""
    if options.mixer is not None and options.to != OURS:
        raise UsageError("convert", f"--mixer={options.mixer!r} needs --to {OURS}: no other dialect holds records")
    if options.untrained and options.model is not None:
        raise UsageError("convert", "--untrained is for a timm model name as SRC, --model for a file")


@dataclass(frozen=True)
class _Start:
    """What was read: the state, the model that it belongs to, and its description as a file of ours.

    `only_ours` says that its records are not those of timm's model, so that no other dialect holds them.
    """

    source: Source
    model: Callable[[], Model]
    description: Description
    only_ours: bool = False


def _start(options: Options) -> _Start:
    path = Path(options.src)
    return _from_file(options, path) if path.suffix in _suffixes() or path.exists() else _from_name(options)


def _suffixes() -> tuple[str, ...]:
    from kernelbank.weights.file import SUFFIXES  # noqa: PLC0415

    return SUFFIXES


def _from_name(options: Options) -> _Start:
    """A model that timm builds, with its weights."""
    import timm  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from kernelbank.weights import convert  # noqa: PLC0415
    from kernelbank.weights.from_timm import create, read_model  # noqa: PLC0415

    if options.model is not None:
        raise UsageError("convert", f"--model={options.model} is for a file; SRC {options.src!r} is no file")
    if timm.is_model(options.src) and not options.untrained and not timm.is_model_pretrained(options.src):
        raise InputError(f"model {options.src} has no pretrained weights; --untrained takes it as it is initialised")
    image: dict[str, Any] = {} if options.img_size is None else {"img_size": options.img_size}
    with torch.random.fork_rng(devices=()), _silenced("huggingface_hub"):
        torch.manual_seed(0)
        model = create(options.src, pretrained=not options.untrained, **image).eval()
    architecture = read_model(model)
    source = convert.read(model.state_dict(), lambda *_: architecture)
    return _Start(source, lambda: model, _describe(source, options.src))


def _from_file(options: Options, path: Path) -> _Start:
    """A file of weights: ours with its description, or of a dialect."""
    from kernelbank.weights import convert  # noqa: PLC0415
    from kernelbank.weights.architecture import infer  # noqa: PLC0415
    from kernelbank.weights.dialects import named  # noqa: PLC0415
    from kernelbank.weights.file import read_state  # noqa: PLC0415
    from kernelbank.weights.libraries import model_of  # noqa: PLC0415
    from kernelbank.weights.saved import Description  # noqa: PLC0415

    if options.untrained:
        raise UsageError("convert", f"--untrained is for a timm model name; SRC {options.src!r} is a file")
    state, metadata = read_state(path)
    ours = Description.read(metadata, str(path))
    if ours is not None:
        if (ours.mixer, ours.mlp) != ours.architecture.records():
            dialect = named(OURS, ours.architecture.family)
            source = convert.Source(state, dialect, {}, ours.architecture, {}, ())
            return _Start(source, lambda: ours.build(state).float(), ours, only_ours=True)
        source = convert.read(state, lambda *_: ours.architecture)
        return _Start(source, lambda: ours.build(state).float(), ours)

    def architect(family: Family, pivot: State) -> Architecture:
        if options.model is None:
            return infer(family, pivot, options.img_size)
        return _named_architecture(options.model, pivot, options.img_size)

    source = convert.read(state, architect)
    return _Start(
        source,
        lambda: model_of(source.dialect, source.architecture, state),
        _describe(source, options.model or path.name),
    )


def _named_architecture(name: str, pivot: State, img_size: tuple[int, int] | None) -> Architecture:
    """The architecture of timm's model `name`, with the classes and input channels of the weights."""
    from kernelbank.weights.from_timm import create, read_model  # noqa: PLC0415

    head = pivot.get("head.weight", pivot.get("head.fc.weight"))
    patches = pivot.get("patch_embed.proj.weight")
    sizes: dict[str, Any] = {"num_classes": 0 if head is None else head.shape[0]}
    sizes |= {} if patches is None else {"in_chans": patches.shape[1]}
    sizes |= {} if img_size is None else {"img_size": img_size}
    return read_model(create(name, meta=True, **sizes))


def _describe(source: Source, name: str) -> Description:
    from kernelbank.weights.saved import Description  # noqa: PLC0415

    return Description(source.architecture, *source.architecture.records(), name)


def _prove(start: _Start, to: Dialect, state: State) -> Proof | str:
    """The proof, or why there is none. Raises InputError where the outputs differ."""
    from kernelbank.weights.libraries import Absent, model_of  # noqa: PLC0415
    from kernelbank.weights.proof import prove  # noqa: PLC0415

    architecture, description = start.source.architecture, start.description

    def target() -> Model:
        return description.build(state).float() if to.name == OURS else model_of(to, architecture, state)

    try:
        return prove(start.model, target, architecture)
    except Absent as reason:
        return str(reason)


def _replace(description: Description, state: State, mixer: str) -> tuple[Description, State, Replaced]:
    """The records `mixer` in every block: the new description and state, and what became of each tensor."""
    from kernelbank.nn.edit.replace import replace_mixers  # noqa: PLC0415
    from kernelbank.nn.mixer import Mixer  # noqa: PLC0415
    from kernelbank.weights.architecture import shortest  # noqa: PLC0415

    backbone = replace_mixers(description.build(state), mixer)
    replaced = cast("Replaced", backbone.replaced)
    arguments = dict(description.architecture.arguments)
    if "qk_norm" in arguments:
        arguments["qk_norm"] = any(isinstance(part, Mixer) and part.qk_norm for part in backbone.modules())
    changed = replace(
        description,
        architecture=replace(description.architecture, arguments=arguments),
        mixer=shortest(list(map(str, replaced.records))),
    )
    state = dict(backbone.state_dict())
    changed.build(state)  # what is written can be loaded
    return changed, state, replaced


@contextmanager
def _silenced(library: str) -> Iterator[None]:
    """Keep a library's warnings, such as every attempt of a download, off stderr: what fails is one error."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Say what takes time, on a terminal."""
    with Console(stderr=True).status(what):
        yield
