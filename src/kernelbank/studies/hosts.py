"""The host models of a study and the rows that fit them. Models are built on the meta device before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kernelbank.data.dataset import Dataset
from kernelbank.errors import InputError, SpecError
from kernelbank.model import ModelSpec, TimmTrunk
from kernelbank.nn.edit.stock import block_attentions
from kernelbank.spec import MixerSpec
from kernelbank.studies.run import on_meta_device
from kernelbank.studies.study import Grid, StudyRow, changed
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions, ModelOptions
from kernelbank.train.sources import model_spec


def host_model(name: str, arguments: Sequence[str], source: DataOptions, data: Dataset, recipe: Recipe) -> ModelSpec:
    """Return the description of the model `name` for `data`, with the drop path rate of `recipe` and constructor
    `arguments` (NAME=VALUE). Raises InputError, SpecError and UsageError."""
    spec = model_spec(name, ModelOptions(model_args=tuple(arguments)), source, data, "study")
    rate = recipe.drop_path or spec.dropout.drop_path_rate
    return replace(spec, dropout=replace(spec.dropout, drop_path_rate=rate)).canonical()


def with_rows(host: ModelSpec, cells: str, rows: Sequence[StudyRow]) -> dict[str, ModelSpec]:
    """`host` with the mixers and MLPs of every row, by label; `cells` are changed before.

    Raises:
        InputError: If a row cannot be built. The message has the reason and the rows that can be built.
    """
    stages = host_stages(host, cells)
    models, failed = dict[str, ModelSpec](), dict[str, Exception]()
    for row in rows:
        try:
            model = changed(host, row, stages)
            on_meta_device(model)
        except (InputError, SpecError) as error:
            failed[row.label] = error
        else:
            models[row.label] = model
    if failed:
        label, reason = next(iter(failed.items()))
        runs = f"the rows that run: --rows {' '.join(models)}" if models else "none of the rows runs"
        raise InputError(f"models: {host.name} cannot hold row {label}: {reason}; {runs}")
    return models


def host_stages(host: ModelSpec, cells: str) -> list[tuple[MixerSpec, Grid]]:
    """The mixer and the grid of every stage of `host`, after `cells` are changed in it. Raises InputError if it cannot
    be the host of a study."""
    try:
        stages = _stages(host)
        mixers = StudyRow("", "", cells).mixers(stages) if cells else [mixer for mixer, _ in stages]
    except (InputError, SpecError) as error:
        raise InputError(f"models: {host.name} cannot be the host of a study: {error}") from None
    return [(mixer, grid) for mixer, (_, grid) in zip(mixers, stages, strict=True)]


def _stages(host: ModelSpec) -> list[tuple[MixerSpec, Grid]]:
    """Return the mixer and the grid of every stage. Raises InputError for a stock model whose attention no spec
    describes."""
    if not isinstance(host.trunk, TimmTrunk):
        return [(stage.mixer, stage.grid) for stage in host.stages]
    model, _ = on_meta_device(host)
    stages = {block.stage: (block.spec, block.mixer.grid) for block in reversed(list(block_attentions(model)))}
    return [stages[index] for index in sorted(stages)]
