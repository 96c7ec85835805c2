"""Run records in a folder, as plain values for claims and reports. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kernelbank.errors import InputError
from kernelbank.files import read_json
from kernelbank.model import TimmTrunk
from kernelbank.records import CodeIdentity, DataIdentity, MachineIdentity, RunRecord, check_numbers
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import ROLES, Role
from kernelbank.train.runs import RunFolder, read_run

RATE_FIELDS = ("lr", "warmup_lr")
"""The fields of a recipe that a search for the learning rate changes; the others are the same in one report section."""
MARKS = frozenset({"record_version", "study", "seed"})
"""The fields by which a JSON file outside a folder named ``records`` is known as a run record."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run in numbers.

    Accuracies are top-1 in per cent. `curve` is the validation accuracy and `seconds` the time per epoch, `epochs` the
    number of epochs in the recipe, and `windowed` whether the trunk is hierarchical. `file` is the path of the run
    record relative to the folder, and `document` its content.
    """

    study: str
    row: str
    model: str
    seed: int
    curve: tuple[float, ...]
    test_top1: float | None
    failure: str | None
    epochs: int
    params: int
    macs: int
    classes: int
    data: DataIdentity
    code: CodeIdentity
    machine: MachineIdentity
    recipe: Mapping[str, Any]
    seconds: tuple[float, ...] = ()
    train_loss: tuple[float, ...] = ()
    mixer: str = ""
    mlp: str = ""
    specs: tuple[MixerSpec, ...] = ()
    windowed: bool = False
    file: str = ""
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def diverged(self) -> bool:
        """Whether the run ended with a failure."""
        return self.failure is not None

    @property
    def finished(self) -> bool:
        """Whether the run has all its epochs."""
        return not self.diverged and len(self.curve) >= self.epochs

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the activation in the sense of the paper's section 5.2, in any stage."""
        return tuple(role for role in ROLES if any(role in spec.roles for spec in self.specs))

    @property
    def epoch_seconds(self) -> float | None:
        """The median time of an epoch, validation included; None without epochs."""
        return median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float:
        """The learning rate that the recipe states."""
        return float(self.recipe.get("lr", 0.0))

    @property
    def setting(self) -> str:
        """Data and recipe as text, without the learning rate: runs are compared where it is the same."""
        recipe = {name: value for name, value in self.recipe.items() if name not in RATE_FIELDS}
        return json.dumps([self.data.sha256, recipe], sort_keys=True)


@dataclass(frozen=True)
class SetAside:
    """A file that is not used, and the reason."""

    file: str
    reason: str


def trained_run(record: RunRecord, file: str = "") -> TrainedRun:
    """The numbers of a run record. Raises ValueError where they cannot be those of a run."""
    check_numbers(record)
    stock = isinstance(record.model.trunk, TimmTrunk)
    return TrainedRun(
        study=record.study,
        row=record.row,
        model=record.model.name,
        seed=record.seed,
        curve=tuple(epoch.val_top1 for epoch in record.epochs),
        test_top1=record.test_top1,
        failure=record.failure,
        epochs=int(record.recipe.get("epochs", len(record.epochs))),
        params=record.params,
        macs=record.macs,
        classes=record.model.num_classes,
        data=record.data,
        code=record.code,
        machine=record.machine,
        recipe=record.recipe,
        seconds=tuple(epoch.seconds for epoch in record.epochs),
        train_loss=tuple(epoch.train_loss for epoch in record.epochs),
        mixer=record.mixer,
        mlp=record.mlp,
        specs=() if stock else tuple(stage.mixer for stage in record.model.stages),
        windowed=record.model.trunk.family == "swin",
        file=file,
        document=record.to_document(),
    )


def read_folder(folder: Path) -> tuple[tuple[TrainedRun, ...], tuple[SetAside, ...]]:
    """The runs of all run records in `folder` and below it, and the files that were set aside.

    A JSON file is read as a run record if it has the `MARKS` of one or lies in a folder named ``records``. The folder
    of a run of ``kernelbank train`` that has no run record yet is read as a run in progress. Other JSON files are not
    looked at further. A file that is not JSON is set aside where a run record is expected. Of two records of the same
    run, the first by path is used.

    Raises:
        InputError: If `folder` is not a folder, or holds no run record that can be read.
    """
    if not folder.is_dir():
        raise InputError(f"invalid FOLDER={folder}; expected a folder with run records")
    runs, aside = dict[str, TrainedRun](), list[SetAside]()
    for path in sorted(path for path in folder.rglob("*.json") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        try:
            run = _read(path, file)
        except (OSError, ValueError) as error:
            aside.append(SetAside(file, f"it is not a run record: {error}"))
            continue
        if run is not None and (first := runs.setdefault(_identity(run), run)) is not run:
            code = "" if run.code == first.code else ", made by another state of the code"
            aside.append(SetAside(file, f"it records the same run as {first.file}{code}"))
    if not runs:
        damaged = f"; {len(aside)} damaged: {aside[0].file}: {aside[0].reason}" if aside else ""
        raise InputError(f"invalid FOLDER={folder}: it holds no run record{damaged}; expected the folder of a study or "
                         "of training runs")  # fmt: skip
    return tuple(runs.values()), tuple(aside)


def _read(path: Path, file: str) -> TrainedRun | None:
    """The run of a file; None for a JSON file of another kind. Raises OSError or ValueError for a damaged record."""
    expected, beside = path.resolve().parent.name == "records", RunFolder(path.parent)
    if path == beside.config:
        return None if beside.record.exists() else trained_run(read_run(path.parent), file)
    try:
        document = read_json(path)
    except ValueError:
        if expected or path == beside.record:
            raise
        return None
    if not expected and not (isinstance(document, Mapping) and MARKS <= document.keys()):
        return None
    return trained_run(RunRecord.from_document(document), file)


def _identity(run: TrainedRun) -> str:
    """Return a text that identifies the run. Code and machine are not part of it. For runs of ``kernelbank train`` it
    includes the model."""
    model = run.document.get("model", {})
    named = [run.study, run.row, run.model, run.mixer, run.mlp, model, run.seed, run.data.sha256, dict(run.recipe)]
    return json.dumps(named, sort_keys=True)


def by_setting(runs: Sequence[TrainedRun]) -> Iterator[tuple[TrainedRun, ...]]:
    """Yield the runs of each setting (data and recipe), starting with the setting with most runs."""
    settings: dict[str, list[TrainedRun]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    for members in sorted(settings.values(), key=len, reverse=True):
        yield tuple(members)


def at_shared_rate(runs: Sequence[TrainedRun]) -> tuple[TrainedRun, ...]:
    """Return the runs at the learning rate that most runs of their study and model use, or the lowest of several."""
    groups: dict[tuple[str, str], list[TrainedRun]] = {}
    for run in runs:
        groups.setdefault((run.study, run.model), []).append(run)
    chosen = list[TrainedRun]()
    for members in groups.values():
        rates = sorted(run.rate for run in members)
        shared = max(dict.fromkeys(rates), key=rates.count)
        chosen += [run for run in members if run.rate == shared]
    return tuple(chosen)


def at_best_rate(runs: Sequence[TrainedRun]) -> tuple[TrainedRun, ...]:
    """Return the runs of each row at the learning rate with the highest final validation accuracy.

    Rates are compared on the tuning seeds of the model, for which every row with several rates has a run at each rate.
    These seeds are excluded from the result, so that the selection does not use the runs that are compared. A row with
    one rate keeps its runs at the other seeds. If a model has several rates but no tuning seeds, it has no runs here.
    """
    models: dict[tuple[str, str], dict[str, dict[float, list[TrainedRun]]]] = {}
    for run in runs:
        rows = models.setdefault((run.study, run.model), {})
        rows.setdefault(run.row, {}).setdefault(run.rate, []).append(run)
    chosen = list[TrainedRun]()
    for rows in models.values():
        tuning = tuning_seeds(rows)
        if not tuning and any(len(rates) > 1 for rates in rows.values()):
            continue
        for rates in rows.values():
            best = max(sorted(rates), key=lambda rate: _tuned(rates[rate], tuning))
            chosen += [run for run in rates[best] if run.seed not in tuning]
    return tuple(chosen)


def tuning_seeds(rows: Mapping[str, Mapping[float, Sequence[TrainedRun]]]) -> frozenset[int]:
    """Return the seeds for which every row with several rates has a run at each rate. `rows` are runs by row and
    rate."""
    groups = [frozenset(run.seed for run in group) for rates in rows.values() if len(rates) > 1
              for group in rates.values()]  # fmt: skip
    return frozenset.intersection(*groups) if groups else frozenset()


def _tuned(runs: Sequence[TrainedRun], seeds: frozenset[int]) -> float:
    """Return the mean final validation accuracy at the tuning seeds. A run that diverged counts as 0."""
    values = [0.0 if run.diverged or not run.curve else run.curve[-1] for run in runs if run.seed in seeds]
    return sum(values) / len(values) if values else 0.0
