"""What can be measured: a timm model, ours among them, or a record as one mixer.

A subject is one word group: ``deit_small_patch16_224``, ``vit_kb_small_patch16_224 : dwsa`` (the model with another
record), ``dwsa support=window(7)`` (one mixer), each with ``@path,path`` to force paths; ``accelerate MODEL`` runs the
linears of a stock model by the fastest form.
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

import kernelbank.models
from kernelbank.atlas import ROWS
from kernelbank.errors import InputError
from kernelbank.nn.accelerate import accelerate
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.paths import SLOTS
from kernelbank.ops.paths.path import PathError
from kernelbank.ops.plan import use_path
from kernelbank.spec import MixerSpec
from kernelbank.text import suggest


@dataclass(frozen=True)
class Site:
    """Where subjects are measured: images of a model and their side, or tokens of a record on a square grid."""

    batch: int
    side: int
    dim: int = 384
    heads: int = 6
    train: bool = False
    half: bool = False


@dataclass(frozen=True)
class Subject:
    """A subject as text, taken apart. `model` is None for a record alone; `record` is what it is given, or None."""

    text: str
    model: str | None
    record: str | None
    paths: tuple[str, ...]
    accelerated: bool


def read(text: str) -> Subject:
    """A subject from its text. Raises InputError and SpecError for names that do not exist."""
    body, at, forced = text.partition("@")
    while at and forced.strip().startswith("positions"):  # @positions belongs to a record's activation
        more, at, rest = forced.partition("@")
        body, forced = f"{body}@{more}", rest
    paths = tuple(word.strip() for word in forced.split(",")) if at else ()
    for path in paths:
        if path not in SLOTS:
            raise InputError(f"unknown path {path!r}{suggest(path, SLOTS)}; expected one of {', '.join(SLOTS)}")
    words = body.split()
    accelerated = words[:1] == ["accelerate"]
    name, colon, record = " ".join(words[accelerated:]).partition(":")
    name, record = name.strip(), record.strip()
    if not name or (colon and not record):
        raise InputError(f"{text!r} names nothing to measure; expected MODEL, MODEL : SPEC or SPEC")
    if not colon and (name.split()[0] in ROWS or "=" in name):
        if accelerated:
            raise InputError("accelerate takes a model; a record chooses its linears itself")
        MixerSpec.parse(name).at_block(1)
        return Subject(text, None, name, paths, False)
    if not timm.is_model(name):
        near = suggest(name, [*timm.list_models(), *ROWS])
        raise InputError(f"unknown model or spec {name!r}{near}; expected a name of timm.list_models() or of the atlas")
    if record:
        MixerSpec.parse(record)
    return Subject(text, name, record or None, paths, accelerated)


class Runner:
    """A built subject: `step()` is one inference or training step on fixed random data."""

    def __init__(self, subject: Subject, site: Site) -> None:
        self.subject, self.site = subject, site
        self.module, self.x = _build(subject, site)
        if subject.accelerated:
            accelerate(self.module)
        if site.half and not site.train:
            self.module, self.x = self.module.bfloat16(), self.x.bfloat16()
        self.module.train(site.train)
        self.step: Callable[[], object] = self._trained() if site.train else self._inferred()

    def _forced(self) -> AbstractContextManager[None]:
        return use_path(*self.subject.paths) if self.subject.paths else nullcontext()

    def _inferred(self) -> Callable[[], object]:
        def step() -> Tensor:
            with torch.no_grad(), self._forced():
                return self.module(self.x)

        return step

    def _trained(self) -> Callable[[], object]:
        """Forward, loss, backward, AdamW; with half precision the forward runs under autocast."""
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

    def macs(self) -> int:
        """Multiply-adds of one image as this subject runs: products and convolutions, no transforms."""
        counter, one = FlopCounterMode(display=False), self.x[:1]
        paths = tuple(path for path in self.subject.paths if SLOTS[path] != "linear")
        self.module.eval()
        with torch.no_grad(), counter, use_path(*paths, "linear"), sdpa_kernel(SDPBackend.MATH):
            self.module(one)
        self.module.train(self.site.train)
        return int(counter.get_total_flops() // 2)


def _build(subject: Subject, site: Site) -> tuple[nn.Module, Tensor]:
    """The module and its input. Raises InputError when timm refuses the size."""
    torch.manual_seed(0)
    if subject.model is None:
        spec = MixerSpec.parse(subject.record or "").at_block(1)
        mixer = Mixer(spec, site.dim, site.heads, (site.side, site.side))
        return mixer, torch.randn(site.batch, site.side**2, site.dim)
    ours = "_kb_" in subject.model or (subject.model in kernelbank.models.default_cfgs)
    options = {"mixer": subject.record} if ours and subject.record else {}
    try:
        model = timm.create_model(subject.model, img_size=site.side, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{subject.text}: cannot be built for images of {site.side}: {error}") from None
    if subject.record and not ours:
        replace_mixers(model, subject.record)
    return model, torch.randn(site.batch, 3, site.side, site.side)


def check(subject: Subject, site: Site) -> None:
    """Raises InputError when a forced path cannot serve: one line, before anything is timed."""
    if subject.paths:
        try:
            Runner(subject, site).step()
        except PathError as error:
            raise InputError(str(error)) from None
