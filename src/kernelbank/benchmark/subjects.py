"""The subjects of a benchmark: models of timm and of this library, and single mixers.

A subject is written as text:

- ``deit_small_patch16_224``: a model
- ``vit_kb_small_patch16_224 : dwsa``: a model with other mixers
- ``accelerate deit_small_patch16_224``: a stock model whose linear layers run in the fastest form
- ``dwsa support=window(7)``: one mixer

``@path,path`` after any of them forces paths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
from kernelbank.nn.accelerate import accelerate
from kernelbank.nn.build import build
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.paths import SLOTS
from kernelbank.ops.paths.path import PathError
from kernelbank.ops.plan import use_path
from kernelbank.spec import MixerSpec
from kernelbank.text import suggest
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
    spec, or None for a model that keeps its own mixers; `paths` are forced; `accelerated` is True for
    ``accelerate``."""

    text: str
    model: str | None
    spec: str | None
    paths: tuple[str, ...]
    accelerated: bool


def read(text: str) -> Subject:
    """Parse the text of a subject. Raises InputError and SpecError for names that do not exist."""
    body, at, forced = text.partition("@")
    while at and forced.strip().startswith("positions"):  # @positions is part of an activation
        more, at, rest = forced.partition("@")
        body, forced = f"{body}@{more}", rest
    paths = tuple(word.strip() for word in forced.split(",")) if at else ()
    for path in paths:
        if path not in SLOTS:
            raise InputError(f"unknown path {path!r}{suggest(path, SLOTS)}; expected one of {', '.join(SLOTS)}")
    words = body.split()
    accelerated = words[:1] == ["accelerate"]
    name, colon, spec = " ".join(words[accelerated:]).partition(":")
    name, spec = name.strip(), spec.strip()
    if not name or (colon and not spec):
        raise InputError(f"{text!r} names nothing to measure; expected MODEL, MODEL : SPEC or SPEC")
    if not colon and (name.split()[0] in ROWS or "=" in name):
        if accelerated:
            raise InputError("accelerate takes a model; a mixer chooses the form of its linear layers itself")
        MixerSpec.parse(name).at_block(1)
        return Subject(text, None, name, paths, False)
    if not timm.is_model(name):
        near = suggest(name, [*timm.list_models(), *ROWS])
        raise InputError(f"unknown model or spec {name!r}{near}; expected a name of timm.list_models() or of the atlas")
    if spec:
        MixerSpec.parse(spec)
    return Subject(text, name, spec or None, paths, accelerated)


class Runner:
    """A subject, built at a site. `step()` runs one inference or training step on fixed random data.

    `macs` are the multiply-adds of one image in closed form, whichever paths run (see `analysis.cost`).
    """

    def __init__(self, subject: Subject, site: Site) -> None:
        self.subject, self.site = subject, site
        torch.manual_seed(0)
        build_subject = _build_mixer if subject.model is None else _build_model
        self.module, self.x, self.macs = build_subject(subject, site)
        if subject.accelerated:
            accelerate(self.module)
        if site.half and not site.train:
            self.module, self.x = self.module.bfloat16(), self.x.bfloat16()
        self.module.train(site.train)
        self.step: Callable[[], object] = self._training_step() if site.train else self._inference_step()

    def _forced(self) -> AbstractContextManager[None]:
        return use_path(*self.subject.paths) if self.subject.paths else nullcontext()

    def _inference_step(self) -> Callable[[], object]:
        def step() -> Tensor:
            with torch.no_grad(), self._forced():
                return self.module(self.x)

        return step

    def _training_step(self) -> Callable[[], object]:
        """Forward, loss, backward and an AdamW update. With `half`, the forward runs under autocast."""
        optimiser = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        target = torch.zeros(self.site.batch, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.site.half)

        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            with self._forced(), autocast:
                y = self.module(self.x)
            loss = F.cross_entropy(y.float(), target) if y.ndim == 2 else y.float().square().mean()
            loss.backward()
            optimiser.step()

        return step

    def path_macs(self) -> int:
        """Count the multiply-adds of one image on the paths that run: matrix products and convolutions, without
        FFTs."""
        counter, one = FlopCounterMode(display=False), self.x[:1]
        paths = tuple(path for path in self.subject.paths if SLOTS[path] != "linear")
        self.module.eval()
        with torch.no_grad(), counter, use_path(*paths, "linear"), sdpa_kernel(SDPBackend.MATH):
            self.module(one)
        self.module.train(self.site.train)
        return int(counter.get_total_flops() // 2)


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
    """Raise InputError if a forced path does not support the subject, before anything is timed."""
    if subject.paths:
        try:
            Runner(subject, site).step()
        except PathError as error:
            raise InputError(str(error)) from None
