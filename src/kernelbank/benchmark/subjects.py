"""The subjects of a benchmark: models of timm and of this library, and single mixers.

A subject is written as text:

- ``deit_small_patch16_224``: a model
- ``vit_kb_small_patch16_224 : dwsa``: a model with other mixers
- ``accelerate deit_small_patch16_224``: a stock model whose linear layers run in the fastest form
- ``compile:vit_kb_small_patch16_224 : dwsa``: a model under torch.compile
- ``bfloat16:vit_kb_small_patch16_224 : dwsa``: a model after ``accelerate(model, dtype="bfloat16")``
- ``onnx:model.onnx``, ``openvino:model.onnx``: an ONNX file in onnxruntime or OpenVINO
- ``dwsa support=window(7)``: one mixer

``@path,path`` after a model or a mixer forces paths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernelbank.analysis.cost import cost
from kernelbank.analysis.count import multiply_adds
from kernelbank.atlas import ROWS
from kernelbank.errors import InputError, SpecError
from kernelbank.exports.runtimes import RUNTIMES, open_file
from kernelbank.nn.accelerate import accelerate
from kernelbank.nn.build import build
from kernelbank.nn.lowered import Half
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.paths import SLOTS
from kernelbank.ops.paths.path import PathError
from kernelbank.ops.plan import use_path
from kernelbank.spec import MixerSpec
from kernelbank.text import one_line, suggest
from kernelbank.train.model import describe


@dataclass(frozen=True)
class Site:
    """The input that subjects are measured on: `batch` images of `side` x `side` pixels for a model, or `batch` square
    grids of `side` x `side` tokens for a mixer of `dim` channels in `heads` heads. `train` measures a training step,
    `half` uses bfloat16."""

    batch: int
    side: int
    dim: int = 384
    heads: int = 6
    train: bool = False
    half: bool = False


@dataclass(frozen=True)
class Subject:
    """A parsed subject. `model` is the name of a timm model, or None for a single mixer; `spec` is the text of the
    spec, or None for a model that keeps its own mixers; `paths` are forced; `form` is how the model runs; `file` is an
    ONNX file in place of all of them, which the runtime `form` runs."""

    text: str
    model: str | None
    spec: str | None
    paths: tuple[str, ...]
    form: str = "eager"
    file: Path | None = None

    @property
    def is_mixer(self) -> bool:
        """Whether it is a single mixer, measured on tokens; models and files are measured on images."""
        return self.model is None and self.file is None


FILES = {"onnx": "onnxruntime", "openvino": "OpenVINO"}
"""The runtime of a file by the word before its name."""
FORMS = ("compile", "bfloat16")
"""The words before a model."""
DTYPES: dict[str, Half | None] = {"accelerate": None, "bfloat16": "bfloat16"}
"""The dtype for `accelerate` by the form of a subject."""


def read(text: str) -> Subject:
    """Parse the text of a subject. Raises InputError and SpecError for names that do not exist."""
    word, colon, rest = text.partition(":")
    if colon and (runtime := FILES.get(word.strip())) is not None:
        return Subject(text, None, None, (), runtime, Path(rest.strip()))
    form = word.strip() if colon and word.strip() in FORMS else "eager"
    return _read(text, text if form == "eager" else rest.strip(), form)


def _read(text: str, model: str, form: str) -> Subject:
    """Parse the part `model` of the text of a subject."""
    body, at, forced = model.partition("@")
    while at and forced.strip().startswith("positions"):  # @positions is part of an activation
        more, at, rest = forced.partition("@")
        body, forced = f"{body}@{more}", rest
    paths = tuple(word.strip() for word in forced.split(",")) if at else ()
    for path in paths:
        if path not in SLOTS:
            raise InputError(f"unknown path {path!r}{suggest(path, SLOTS)}; expected one of {', '.join(SLOTS)}")
    words = body.split()
    if words[:1] == ["accelerate"]:
        if form != "eager":
            raise InputError(f"invalid subject {text!r}; expected {form} or accelerate, not both")
        words, form = words[1:], "accelerate"
    name, colon, spec = " ".join(words).partition(":")
    name, spec = name.strip(), spec.strip()
    if not name or (colon and not spec):
        raise InputError(f"{text!r} names nothing to measure; expected MODEL, MODEL : SPEC or SPEC")
    if not colon and (name.split()[0] in ROWS or "=" in name):
        if form in DTYPES:
            raise InputError(f"{form} takes a model; a mixer chooses the form of its linear layers itself")
        MixerSpec.parse(name).at_block(1)
        return Subject(text, None, name, paths, form)
    if not timm.is_model(name):
        near = suggest(name, [*timm.list_models(), *ROWS])
        raise InputError(f"unknown model or spec {name!r}{near}; expected a name of timm.list_models() or of the atlas")
    if spec:
        MixerSpec.parse(spec)
    return Subject(text, name, spec or None, paths, form)


class Runner:
    """A subject, built at a site. `step()` runs one inference or training step on fixed random data.

    `macs` are the multiply-adds of one image in closed form, whichever paths run (see `analysis.cost`).
    """

    def __init__(self, subject: Subject, site: Site) -> None:
        self.subject, self.site = subject, site
        torch.manual_seed(0)
        build_subject = _build_mixer if subject.is_mixer else _build_model
        self.module, self.x, self.macs = build_subject(subject, site)
        self.module.train(site.train)
        if subject.form in DTYPES:
            accelerate(self.module, DTYPES[subject.form])
        if site.half and not site.train:
            self.module, self.x = self.module.bfloat16(), self.x.bfloat16()
        # not in place: the multiply-adds are counted in the eager model
        self.runs = torch.compile(self.module) if subject.form == "compile" else self.module
        self.step: Callable[[], object] = self._training_step() if site.train else self._inference_step()

    def _forced(self) -> AbstractContextManager[None]:
        return use_path(*self.subject.paths) if self.subject.paths else nullcontext()

    def _inference_step(self) -> Callable[[], object]:
        def step() -> Tensor:
            with torch.no_grad(), self._forced():
                return self.runs(self.x)

        return step

    def _training_step(self) -> Callable[[], object]:
        """Forward, loss, backward and an AdamW update. With `half`, the forward runs under autocast."""
        optimiser = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        target = torch.zeros(self.site.batch, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.site.half)

        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            with self._forced(), autocast:
                y = self.runs(self.x)
            loss = F.cross_entropy(y.float(), target) if y.ndim == 2 else y.float().square().mean()
            loss.backward()
            optimiser.step()

        return step

    def path_macs(self) -> int | None:
        """Count the multiply-adds of one image on the paths that run: matrix products and convolutions, without
        FFTs."""
        counter, one = FlopCounterMode(display=False), self.x[:1]
        paths = tuple(path for path in self.subject.paths if SLOTS[path] != "linear")
        self.module.eval()
        with torch.no_grad(), counter, use_path(*paths, "linear"), sdpa_kernel(SDPBackend.MATH):
            self.module(one)
        self.module.train(self.site.train)
        return int(counter.get_total_flops() // 2)


class FileRunner:
    """An ONNX file at a site, with the interface of `Runner`. Its multiply-adds are not known.

    Raises:
        InputError: If the runtime is missing, or does not run the file on these images.
    """

    macs = None

    def __init__(self, subject: Subject, site: Site) -> None:
        assert subject.file is not None
        if site.train or site.half:
            raise InputError(f"{subject.text}: a file runs in inference and in its own dtype; expected no --train and "
                             "no --bf16")  # fmt: skip
        run = open_file(RUNTIMES[subject.form], subject.file)
        images = torch.randn(site.batch, 3, site.side, site.side)
        self.step: Callable[[], object] = lambda: run(images)
        try:
            self.step()
        except Exception as error:  # of any type
            raise InputError(f"{subject.text} does not run on {site.batch} images of {site.side} x {site.side}: "
                             f"{one_line(error, 200)}") from error  # fmt: skip

    def path_macs(self) -> int | None:
        """None."""
        return None


def runner(subject: Subject, site: Site) -> Runner | FileRunner:
    """Build a subject at a site."""
    return Runner(subject, site) if subject.file is None else FileRunner(subject, site)


def _build_mixer(subject: Subject, site: Site) -> tuple[nn.Module, Tensor, int]:
    """Return a mixer, its input and its multiply-adds per image."""
    spec, grid = MixerSpec.parse(subject.spec or "").at_block(1), (site.side, site.side)
    mixer = Mixer(spec, site.dim, site.heads, grid)
    x = torch.randn(site.batch, site.side**2, site.dim)
    return mixer, x, cost(spec, site.dim, site.heads, grid).macs


def _build_model(subject: Subject, site: Site) -> tuple[nn.Module, Tensor, int]:
    """Return a model, its input and its multiply-adds per image. Raises InputError if it cannot be built at this
    size."""
    image = (site.side, site.side)
    try:
        spec = describe(subject.model or "", mixer=subject.spec, img_size=image)
        model = build(spec)
    except (InputError, SpecError) as error:
        raise InputError(f"{subject.text}: cannot be built for images of {site.side} x {site.side}: {error}") from None
    return model, torch.randn(site.batch, 3, *image), multiply_adds(model, spec, image)


def check(subject: Subject, site: Site) -> None:
    """Raise InputError if a forced path does not support the subject, or a file does not run, before anything is
    timed."""
    if subject.paths or subject.file is not None:
        try:
            runner(subject, site).step()
        except PathError as error:
            raise InputError(str(error)) from None
