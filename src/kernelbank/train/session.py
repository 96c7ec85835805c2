"""A training run from its options to its run record; ``kernelbank train`` and the studies share it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from rich.console import Console
from torch import nn

from kernelbank.analysis.count import multiply_adds
from kernelbank.data.dataset import Dataset
from kernelbank.errors import InputError, UsageError, WorkerError
from kernelbank.files import sole_user, writable_folder
from kernelbank.model import ModelSpec
from kernelbank.records import CodeIdentity, EpochResult, MachineIdentity, RunRecord
from kernelbank.schema import decode
from kernelbank.terminal import print_line, warn, warnings_to
from kernelbank.train.checkpoint import differences
from kernelbank.train.engine import Engine, gpu_settings
from kernelbank.train.loop import DivergedError, StepReport, Stopped, evaluate, train
from kernelbank.train.model import check_model, create, describe, described
from kernelbank.train.progress import Watch, watch
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions, ModelOptions, TrainOptions
from kernelbank.train.run_weights import write_weights
from kernelbank.train.runs import OUTPUTS, Log, RunFolder
from kernelbank.train.signals import StopRequest, stop_on_signal
from kernelbank.train.sources import enlargement, initial_weights, model_spec, open_dataset
from kernelbank.train.tracking import Track, tracking

IDENTITY = ("model", "start", "data", "recipe", "seed", "linear_form")
"""The fields of run.json that a resumed run must share with the run in its folder."""
STATED = ("model", "recipe", "seed", "weights", "source", "settings")
"""The options that run.json states."""


# ---- the run record --------------------------------------------------------------------------------------


def begin_record(
    *, study: str, row: str, model: nn.Module, spec: ModelSpec, recipe: Recipe, data: Dataset, seed: int, engine: Engine
) -> RunRecord:
    """Return the run record of a run before its first epoch."""
    on_gpu = engine.device.type == "cuda"
    machine = MachineIdentity.here(
        torch.get_num_threads(), torch.cuda.get_device_name(engine.device) if on_gpu else None, engine.part.world,
        gpu_settings() if on_gpu else None,
    )  # fmt: skip
    return RunRecord(
        study=study, row=row, model=spec, recipe=json.loads(json.dumps(asdict(recipe))), data=data.identity, seed=seed,
        code=CodeIdentity.here(), machine=machine,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=multiply_adds(model, spec, data.img_size), images=data.images,
    )  # fmt: skip


@dataclass(frozen=True)
class Hooks:
    """Functions that a run calls: `on_epoch` with every epoch and whether it was read from a checkpoint, `on_step` with
    every report, and `stop`, which returns whether the run is to stop."""

    on_epoch: Callable[[EpochResult, bool], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    stop: Callable[[], bool] | None = None

    def tracked(self, track: Track | None) -> Hooks:
        """Return these hooks, which also send the results of every epoch trained in this process to `track`."""
        if track is None:
            return self
        count = 0

        def on_epoch(result: EpochResult, restored: bool) -> None:
            nonlocal count
            count += 1
            if self.on_epoch:
                self.on_epoch(result, restored)
            if not restored:
                track({name: value for name, value in asdict(result).items() if value is not None}, count)

        return replace(self, on_epoch=on_epoch)


def train_and_test(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    record: RunRecord,
    *,
    engine: Engine,
    checkpoint: Path,
    hooks: Hooks,
) -> tuple[RunRecord, DivergedError | None]:
    """Train `model`, or resume it from its checkpoint, evaluate it on the test split once, and return the completed run
    record. For a run that diverges, the record has a failure and the error is returned with it.

    Raises:
        Stopped: If `hooks.stop` returns True.
        InputError: As `train`.
    """
    epochs: list[EpochResult] = []

    def collect(result: EpochResult, restored: bool) -> None:
        epochs.append(result)
        if hooks.on_epoch:
            hooks.on_epoch(result, restored)

    try:
        train(model, data, recipe, seed=record.seed, engine=engine, checkpoint=checkpoint, on_epoch=collect,
              on_step=hooks.on_step, stop=hooks.stop)  # fmt: skip
        test = evaluate(model, data.test, engine=engine) if data.test is not None else None
    except DivergedError as error:
        return replace(record, epochs=tuple(epochs), failure=str(error)), error
    loss, top1 = (None, None) if test is None else (test.loss, test.top1)
    return replace(record, epochs=tuple(epochs), test_loss=loss, test_top1=top1), None


# ---- kernelbank train ------------------------------------------------------------------------------------


def resolve(options: TrainOptions) -> tuple[TrainOptions, RunFolder]:
    """Return the options and the folder of the run; options that a resumed run does not repeat are those in run.json.
    Raises UsageError and InputError."""
    if options.model:
        name = options.model.replace("/", "-")
        folder = RunFolder(Path(options.out or f"runs/{name}-{options.recipe}-seed{options.seed}"))
    elif not options.resume or options.out is None:
        raise UsageError("train", "a model is missing; expected MODEL, or --resume --out FOLDER to resume a run")
    else:
        folder = RunFolder(Path(options.out))
        options = _stated_options(options, folder)
    options.check()
    options.source.check("train")
    return options, folder


def _stated_options(options: TrainOptions, folder: RunFolder) -> TrainOptions:
    """Return the options of the run in `folder`, with the hardware and the outputs of `options`. Raises InputError."""
    stated = folder.read_config()["options"]
    try:
        return replace(
            options,
            model=_stated(stated, "model", str),
            recipe=_stated(stated, "recipe", str),
            seed=_stated(stated, "seed", int),
            weights=decode(ModelOptions, stated.get("weights"), "weights"),
            source=replace(decode(DataOptions, stated.get("source"), "source"), workers=options.source.workers),
            settings=decode(Recipe, stated.get("settings"), "settings"),
        )
    except ValueError as error:
        raise InputError(f"run: {folder.config} is damaged: {error}") from None


def _stated(options: dict[str, Any], name: str, kind: type) -> Any:
    """An option of run.json. Raises ValueError for another type."""
    if type(options.get(name)) is not kind:
        raise ValueError(f"invalid options.{name}={options.get(name)!r}; expected {kind.__name__}")
    return options[name]


class Session:
    """One run of ``kernelbank train``."""

    def __init__(self, options: TrainOptions) -> None:
        self.options, self.folder = resolve(options)
        check_model(self.options.model)
        self.recipe = self.options.settings
        self.start = initial_weights(self.options.weights)
        # errors in the options are raised before any image is read
        describe(self.options.model, arguments=self.options.weights.arguments("train"))
        self.engine = Engine(self.options.hardware, self.options.tracker, self.folder.path)
        self.console = Console(stderr=True)
        self.log: Log | None = None

    def run(self) -> int:
        """Train, or resume the run in the folder, and return the exit code. Raises InputError, OSError and
        WorkerError."""
        engine, main = self.engine, self.engine.main
        with ExitStack() as stack:
            if main:
                writable_folder(self.folder.path)
                stack.enter_context(sole_user(self.folder.path, OUTPUTS))
                self._check_folder()
            engine.wait()
            if self.options.resume and self.folder.record.exists():
                finished = RunRecord.load(self.folder.record)
                if finished.failure is None:
                    self._summarise(finished)
                    return 0
            self.log = stack.enter_context(_closing(Log(self.folder))) if main else None
            stack.enter_context(warnings_to(self._warn))
            return self._train()

    def _warn(self, text: str) -> None:
        if self.engine.main:
            print_line(self.console, text)
        self._write("warning", message=text)

    def _check_folder(self) -> None:
        """Remove the files of a run that ended before its first checkpoint. Raises InputError if a run would be lost,
        or if there is no run to resume."""
        folder, exists = self.folder, self.folder.config.exists()
        if exists and not self.options.resume:
            if not any(path.exists() for path in (folder.checkpoint, folder.record)):
                folder.config.unlink()
                folder.log.unlink(missing_ok=True)
                return
            raise InputError(f"out: {self.folder.path} holds a run; expected --resume to resume it, or another --out")
        if self.options.resume and not exists:
            raise InputError(f"resume: {self.folder.path} holds no run; expected the folder of one, or no --resume")

    def _train(self) -> int:
        options, engine, recipe = self.options, self.engine, self.recipe
        data = open_dataset(options.model, options.source, recipe, engine, self.console)
        spec = model_spec(options.model, options.weights, options.source, data, "train")
        spec = replace(
            spec, dropout=replace(spec.dropout, drop_path_rate=recipe.drop_path or spec.dropout.drop_path_rate)
        )
        model, notes = create(spec, self.start, seed=options.seed)
        record = begin_record(
            study="train", row=self.folder.path.name, model=model, spec=described(spec, model), recipe=recipe,
            data=data, seed=options.seed, engine=engine,
        )  # fmt: skip
        document = self._document(spec, record)
        if engine.main:
            self._compare(document)
        settings = {"model": record.model.name, "mixer": record.mixer, "data": data.name, "seed": record.seed,
                    **record.recipe}  # fmt: skip
        with (
            tracking(engine, self.folder.path, document["id"], settings) as self.track,
            stop_on_signal(_print_message if engine.main else None) as request,
            watch(self.console, recipe.epochs, engine.main) as self.watch,
        ):
            if engine.main and not self.folder.config.exists():
                self.folder.write_config(document)
            if self.watch:
                self._print_start(self.watch, record, data, notes)
            self.logged = set(self.folder.epochs()) if engine.main else set()
            self.count = 0
            stopped: Stopped | None = None
            try:
                record, diverged = train_and_test(
                    model, data, recipe, record, engine=engine, checkpoint=self.folder.checkpoint,
                    hooks=Hooks(self._on_epoch, self._on_step, request),
                )  # fmt: skip
            except Stopped as error:
                stopped = error
        # outside the context, whose line about the signal comes first
        if stopped is not None:
            return self._stopped(stopped, request)
        if diverged is not None:
            self._diverged(record, diverged)
        self._finish(record)
        return 0

    def _document(self, spec: ModelSpec, record: RunRecord) -> dict[str, Any]:
        """The contents of run.json; the id is that of the run.json in the folder, if there is one."""
        options = self.options
        config = self.folder.read_config() if self.folder.config.exists() else {}
        document = {
            "id": config.get("id", uuid4().hex[:8]), "model": spec.to_document(), "start": asdict(self.start),
            "recipe": asdict(self.recipe), "seed": options.seed, "data": asdict(record.data),
            "record": record.to_document(), "hardware": asdict(options.hardware), "linear_form": record.linear_form,
            "options": {name: _plain(getattr(options, name)) for name in STATED},
        }  # fmt: skip
        return cast("dict[str, Any]", json.loads(json.dumps(document)))

    def _compare(self, document: dict[str, Any]) -> None:
        """Raise InputError if the folder holds another run, naming the differences."""
        if not self.folder.config.exists():
            return
        config = self.folder.read_config()
        before, now = ({name: side.get(name) for name in IDENTITY} for side in (config, document))
        if before != now:
            raise InputError(f"resume: {self.folder.path} holds another run: {differences(before, now)}")

    def _print_start(self, shown: Watch, record: RunRecord, data: Dataset, notes: list[str]) -> None:
        options, engine, recipe = self.options, self.engine, self.recipe
        world = engine.part.world
        processes = f"{world} processes, {options.hardware.parallel}" if world > 1 else "one process"
        where = f"{engine.device.type}, {processes}, {engine.accelerator.mixed_precision.replace('no', 'float32')}"
        mixer = f" mixer {record.mixer!r}" if record.mixer else ""
        for note in [*notes, *data.notes, *enlargement(data, options.source)]:
            shown.say(note)
        shown.say(f"{record.model.name}{mixer}: {record.params / 1e6:.2f} M parameters, {record.macs / 1e9:.3g} G "
                  "multiply-adds")  # fmt: skip
        shown.say(f"{data.name}: {len(data.train)} training, {len(data.val)} validation, "
                  f"{0 if data.test is None else len(data.test)} test images, {data.num_classes} classes")  # fmt: skip
        shown.say(f"recipe {options.recipe}: {recipe.epochs} epochs, batch {recipe.batch_size}, "
                  f"lr {recipe.rates.top:.3g}; {where}; {self.folder.path}")  # fmt: skip

    def _on_epoch(self, result: EpochResult, restored: bool) -> None:
        self.count += 1
        if self.watch:
            self.watch.epoch(result, restored)
        if self.count not in self.logged:  # a process may be killed between checkpoint and log
            self._write("epoch", epoch=self.count, **asdict(result))
        if not restored:
            self.track({name: value for name, value in asdict(result).items() if value is not None}, self.count)

    def _on_step(self, report: StepReport) -> None:
        if self.watch:
            self.watch.step(report)
        self._write("step", **asdict(report))

    def _write(self, event: str, **values: Any) -> None:
        if self.log is not None:
            self.log(event, **values)

    # ---- the end ----

    def _stopped(self, stopped: Stopped, request: StopRequest) -> int:
        self._write("stopped", message=str(stopped))
        self.engine.close()
        if self.engine.main:
            _print_message(f"{stopped}; resume with: kernelbank train --resume --out {self.folder.path}")
        return request.exit_code

    def _diverged(self, record: RunRecord, diverged: DivergedError) -> None:
        """Record the failure. Raises WorkerError."""
        self._write("diverged", message=record.failure)
        self.engine.close()
        if self.engine.main:
            record.save(self.folder.record)
        last = f"the last good checkpoint is {diverged.last_good}" if diverged.last_good else "there is no checkpoint"
        raise WorkerError(f"{record.failure}; {last}")

    def _finish(self, record: RunRecord) -> None:
        """Write weights and run record, and print the summary. The checkpoint is kept."""
        self.engine.close()
        if not self.engine.main:
            return
        write_weights(self.folder, record.model)
        record.save(self.folder.record)
        self._write("end", test_loss=record.test_loss, test_top1=record.test_top1)
        self._summarise(record)

    def _summarise(self, record: RunRecord) -> None:
        if not self.engine.main:
            return
        if self.options.json:
            print(record.to_json(), end="")
            return
        last = record.epochs[-1]
        test = "" if record.test_top1 is None else f", test top-1 {record.test_top1:.2f}"
        print(f"validation top-1 {last.val_top1:.2f} (best {record.best_val_top1:.2f}){test}; {record.seconds:.0f} s; "
              f"{self.folder.path}/record.json, weights.safetensors, log.jsonl")  # fmt: skip


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@contextmanager
def _closing(log: Log) -> Iterator[Log]:
    try:
        yield log
    finally:
        log.close()


def _print_message(line: str) -> None:
    warn(f"kernelbank train: {line}")
