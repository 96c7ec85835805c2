"""A conversion from its source to the file it writes: read, translate, prove, replace mixers, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch

from kernelbank.errors import InputError, SpecError, UsageError
from kernelbank.model import RESERVED_ARGUMENTS, ModelSpec, SwinTrunk, TimmTrunk, by_stage
from kernelbank.nn.edit.replace import Replaced, replace_mixers
from kernelbank.weights import convert
from kernelbank.weights.alike import settle
from kernelbank.weights.contents import Contents
from kernelbank.weights.convert import SourceState
from kernelbank.weights.dialects import Dialect, MissingLibraryError, known, named
from kernelbank.weights.file import SUFFIXES, check_destination, open_model_file
from kernelbank.weights.folder import CONFIG, beside, read_folder
from kernelbank.weights.from_timm import create, from_timm, read_model
from kernelbank.weights.infer import Family, Inferred, infer
from kernelbank.weights.keymap import State, fit, listed
from kernelbank.weights.load import rebuild
from kernelbank.weights.proof import Proof, Run, prove
from kernelbank.weights.stated import describe as describe_stated
from kernelbank.weights.stated import model as build_stated
from kernelbank.weights.stated import read_config
from kernelbank.weights.stock import is_stock

OURS = "kernelbank"
LOADING = RESERVED_ARGUMENTS - {"img_size", "in_chans", "num_classes"} | {"meta"}
"""The arguments that a configuration of timm must not have: weights to load from elsewhere."""
Status = Callable[[str], Any]
"""A context manager that shows what is going on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be converted: see the options of ``kernelbank convert``."""

    src: str
    dst: str
    to: str = OURS
    model: str | None = None
    entry: str | None = None
    img_size: tuple[int, int] | None = None
    mixer: str | None = None
    untrained: bool = False
    require_proof: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was converted. `spec` is the description of what was written; `proof` is a proof, or why there is none;
    `replaced` is the table of what became of each tensor where mixers were replaced."""

    source: SourceState
    to: Dialect
    state: State
    proof: Proof | str
    path: Path
    spec: ModelSpec
    replaced: Replaced | None

    @property
    def proved(self) -> bool:
        """Whether the outputs were compared and nothing about the model was assumed."""
        return isinstance(self.proof, Proof) and not self.source.assumed


@dataclass(frozen=True)
class _Opened:
    """What was read, and the model it belongs to with its weights. `translates` says whether other dialects can hold
    its mixers."""

    source: SourceState
    model: Callable[[], Run]
    translates: bool = True


def run(request: Request, status: Status) -> Outcome:
    """Read, convert, prove and write.

    Raises:
        InputError: If anything does not fit; no file is left then. SpecError: If a mixer does not fit.
    """
    known(request.to)
    check_destination(Path(request.dst))
    with status(f"reading {request.src}"):
        opened = _open(request)
    source = opened.source
    to = named(request.to, source.dialect.family)
    if not opened.translates and not to.library.holds_specs:
        raise InputError(f"{request.src}: {_model(source.spec)} has no place in {to.name}; expected --to {OURS}")
    state = convert.write(source, to) if opened.translates else dict(source.state)
    if opened.translates and (wrong := convert.differing(source, state, to)):
        raise InputError(f"the way back is not bit-equal: {listed(wrong)}")
    with status("running the same images through both models"):
        proof = _prove(opened, to, state)
    if request.require_proof and (isinstance(proof, str) or source.assumed):
        reason = proof if isinstance(proof, str) else f"assumed: {', '.join(source.assumed)}"
        raise InputError(f"not proved: {reason} (--require-proof)")
    spec, report = source.spec, None
    if request.mixer is not None:
        spec, state, report = _replace(spec, state, request.mixer)
    to.library.write(Path(request.dst), state, spec, request.src)
    return Outcome(
        source=source, to=to, state=state, proof=proof, path=Path(request.dst), spec=spec, replaced=report
    )  # fmt: skip


# ---- the source ------------------------------------------------------------------------------------------


def _open(request: Request) -> _Opened:
    path = Path(request.src)
    if path.suffix in SUFFIXES or path.exists():
        return _open_file(request, path)
    return _open_name(request)


def _open_name(request: Request) -> _Opened:
    """A model that timm builds, with its weights."""
    if request.model is not None:
        raise UsageError("convert", f"invalid --model={request.model}; expected a file as SRC with it, not a name")
    if request.entry is not None:
        raise UsageError("convert", f"invalid --entry={request.entry}; expected a file as SRC with it, not a name")
    if timm.is_model(request.src) and not request.untrained and not timm.is_model_pretrained(request.src):
        raise InputError(f"model {request.src} has no pretrained weights; --untrained takes its initial ones")
    image: dict[str, Any] = {} if request.img_size is None else {"img_size": request.img_size}
    with torch.random.fork_rng(devices=()), _quiet("huggingface_hub"):
        torch.manual_seed(0)
        model = create(request.src, pretrained=not request.untrained, **image).eval()
    spec = replace(read_model(model), name=request.src)
    source = convert.read(dict(model.state_dict()), lambda *_: Inferred(spec))
    return _Opened(source, lambda: cast(Run, model))


def _open_file(request: Request, path: Path) -> _Opened:
    """A file or folder of weights: ours with its description, with a configuration beside it, or of a dialect."""
    if request.untrained:
        raise UsageError("convert", "invalid --untrained with a file as SRC; expected the name of a timm model")
    contents, spec = (read_folder(path, request.entry), None) if path.is_dir() else open_model_file(path, request.entry)
    if spec is not None:
        return _open_ours(spec, contents.state, str(path))
    config = beside(path)
    if config is not None and request.model is None:
        architecture = config.get("architecture")
        opened = _open_timm if isinstance(architecture, str) else _open_stated
        return opened(request, config, contents)

    def describe(family: Family, pivot: State) -> Inferred:
        if request.model is None:
            inferred = settle(family, pivot, infer(family, pivot, request.img_size))
        else:
            inferred = _describe_named(request, pivot)
        return Inferred(replace(inferred.spec, name=request.model or path.name), inferred.assumed)

    source = replace(convert.read(contents.state, describe), notes=contents.notes)
    return _Opened(source, lambda: source.dialect.model(source.spec, source.remaining))


def _open_stated(request: Request, config: Mapping[str, Any], contents: Contents) -> _Opened:
    """Weights with a configuration of transformers, from which transformers builds the model of the proof."""
    where = f"{request.src}: {CONFIG}"
    stated = read_config(config, where)

    def describe(family: Family, pivot: State) -> Inferred:
        inferred = describe_stated(stated, family, pivot, where)
        return Inferred(replace(inferred.spec, name=Path(request.src).name), inferred.assumed)

    source = replace(convert.read(contents.state, describe), notes=contents.notes)
    return _Opened(source, lambda: build_stated(stated, source.spec, source.remaining))


def _open_timm(request: Request, config: Mapping[str, Any], contents: Contents) -> _Opened:
    """Weights with a configuration of timm, from which timm builds the model of the proof."""
    name, arguments = config["architecture"], config.get("model_args") or {}
    if not isinstance(arguments, Mapping) or LOADING & arguments.keys():
        raise InputError(f"{request.src}: {CONFIG}: invalid model_args={arguments!r}; expected arguments of the "
                         f"constructor without {', '.join(sorted(LOADING))}")  # fmt: skip
    sizes = {key: config[key] for key in ("num_classes", "global_pool") if key in config} | dict(arguments)
    sizes |= {} if request.img_size is None else {"img_size": request.img_size}
    model = create(name, **sizes)
    fit(contents.state, model.state_dict(), f"{request.src}: {name} of timm")
    model.load_state_dict(contents.state)
    spec = replace(read_model(model.eval()), name=name)
    source = replace(convert.read(contents.state, lambda *_: Inferred(spec)), notes=contents.notes)
    return _Opened(source, lambda: cast(Run, model.float()))


def _open_ours(spec: ModelSpec, state: State, path: str) -> _Opened:
    """A file with a description: in timm's names where timm's classes can hold the model, else as it is."""

    def model() -> Run:
        return cast(Run, rebuild(spec, state, path).float())

    def translated(described: ModelSpec, state: State) -> _Opened:
        return _Opened(convert.read(state, lambda *_: Inferred(described)), model)

    def untranslated(described: ModelSpec, state: State) -> _Opened:
        family: Family = "swin" if isinstance(described.trunk, SwinTrunk) else "vit"
        source = SourceState(state, named(OURS, family), {}, described, (), {}, ())
        return _Opened(source, model, translates=False)

    if not isinstance(spec.trunk, TimmTrunk):
        return translated(spec, state) if is_stock(spec) else untranslated(spec, state)
    stock = rebuild(spec, state, path)
    try:
        described = replace(read_model(stock), name=spec.name)
    except (InputError, SpecError):  # a class of timm that has no trunk of ours
        return untranslated(spec, state)
    if spec.mixer is None:
        return translated(described, state)
    ours = dict(from_timm(stock).state_dict())
    return translated(described, ours) if is_stock(described) else untranslated(described, ours)


def _model(spec: ModelSpec) -> str:
    """The model in words."""
    if isinstance(spec.trunk, TimmTrunk):
        return f"timm's {spec.trunk.name}" + ("" if spec.mixer is None else f" with mixer={spec.mixer!r}")
    return f"a {spec.trunk.family} with mixer={spec.mixer!r}, mlp={spec.mlp!r}"


def _describe_named(request: Request, pivot: State) -> Inferred:
    """The description of timm's model by its name, with the classes and input channels of the weights."""
    head = pivot.get("head.weight", pivot.get("head.fc.weight"))
    patches = pivot.get("patch_embed.proj.weight")
    sizes: dict[str, Any] = {"num_classes": 0 if head is None else head.shape[0]}
    sizes |= {} if patches is None else {"in_chans": patches.shape[1]}
    sizes |= {} if request.img_size is None else {"img_size": request.img_size}
    return Inferred(read_model(create(cast(str, request.model), meta=True, **sizes)))


# ---- proof, mixers ---------------------------------------------------------------------------------------


def _prove(opened: _Opened, to: Dialect, state: State) -> Proof | str:
    """The proof, or why there is none. Raises InputError where the outputs differ."""
    spec = opened.source.spec

    def target() -> Run:
        if isinstance(spec.trunk, TimmTrunk):
            return cast(Run, rebuild(spec, state, "the converted state").float())
        return to.model(spec, state)

    try:
        if spec.img_size is None:
            return "the description does not state the image size"
        return prove(opened.model, target, spec)
    except MissingLibraryError as reason:
        return str(reason)


def _replace(spec: ModelSpec, state: State, mixer: str) -> tuple[ModelSpec, State, Replaced]:
    """The specs `mixer` in every block: the new description and state, and what became of each tensor."""
    model = replace_mixers(rebuild(spec, state, "the converted state"), mixer)
    report = cast(Replaced, model.replaced)
    changed = replace(spec, mixer=by_stage(list(map(str, report.specs))))
    state = dict(model.state_dict())
    rebuild(changed, state, "the converted state")  # what is written can be loaded
    return changed, state, report


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library's warnings, such as one per attempt of a download, off stderr: a failure is one error."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
