"""Factors after the activation, chosen once: the outputs of a row's mixers are as large as those of the baseline.

A pipeline without softmax changes the scale of the mixer's output as well as its shape. A row whose activation ends in
``scale({scale})`` has that factor in the spec of every stage, so that a run record states it and anyone can build it:

    x_s = RMS of the outputs of the baseline's mixers in stage s / RMS of the row's

before training, over the blocks of the stage and the first `IMAGES` validation images, in float64. Both models have the
weights of seed 0, batch statistics where the pipeline has a batchnorm, and no dropout. All runs of a row have the same
factors. They are rounded, so that machines agree on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernelbank.data.dataset import UNREADABLE, Dataset
from kernelbank.data.order import Part, in_order
from kernelbank.errors import InputError
from kernelbank.model import Dropout, ModelSpec
from kernelbank.nn.edit.stock import block_attentions
from kernelbank.spec import MixerSpec
from kernelbank.studies.run import drawn
from kernelbank.studies.study import Grid, StudyRow, changed

IMAGES = 16
ROUNDS = 2
"""A block takes in what the blocks before it put out: the second measurement is with the factors of the first."""
DIGITS = 3
SEED = 0


def with_post_scales(
    host: ModelSpec,
    stages: Sequence[tuple[MixerSpec, Grid]],
    rows: Sequence[StudyRow],
    baseline: StudyRow,
    data: Dataset,
) -> Mapping[str, ModelSpec]:
    """`host` with the mixers of every row and their measured factors, by label. `stages` are those of the host.

    Raises:
        InputError: If the outputs of a row are zero or not finite, or no image can be read.
    """
    images = first_images(data)
    target = output_rms(changed(host, baseline, stages), images)
    models = {}
    for row in rows:
        scales = [1.0] * len(stages)
        for _ in range(ROUNDS):
            found = output_rms(changed(host, row, stages, scales), images)
            if not all(math.isfinite(rms) and rms > 0 for rms in found):
                raise InputError(f"models: {host.name} cannot hold row {row.label}: the outputs of its mixers have an "
                                 f"RMS of {found} at the start; expected finite numbers > 0")  # fmt: skip
            scales = [scale * aim / rms for scale, aim, rms in zip(scales, target, found, strict=True)]
        models[row.label] = changed(host, row, stages, [float(f"{scale:.{DIGITS}g}") for scale in scales])
    return models


def first_images(data: Dataset) -> Tensor:
    """The first `IMAGES` validation images in float64. Raises InputError if none can be read."""
    shares = list(in_order(min(IMAGES, len(data.val)), IMAGES, Part()))
    images, labels = next(iter(data.val.batches(shares, None)))
    images = images[labels != UNREADABLE]
    if not len(images):
        raise InputError(f"data: none of the first {IMAGES} validation images can be read")
    return images.cpu().double()


def output_rms(spec: ModelSpec, images: Tensor) -> list[float]:
    """The root mean square of the outputs of the mixers on `images`, by stage, at the start of training."""
    model = drawn(replace(spec, dropout=Dropout()), SEED).double().train()
    squares: dict[int, list[Tensor]] = {}

    def note(stage: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            squares.setdefault(stage, []).append(output.square().mean())

        return hook

    for block in block_attentions(model):
        block.mixer.register_forward_hook(note(block.stage))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(images)
    return [float(torch.stack(squares[stage]).mean().sqrt()) for stage in sorted(squares)]
