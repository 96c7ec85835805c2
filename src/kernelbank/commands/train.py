"""``kernelbank train`` and ``kernelbank evaluate``."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernelbank.commands.options import read_options
from kernelbank.commands.train_options import (
    DataOptions,
    EvaluateOptions,
    ModelOptions,
    TrainOptions,
    cache_folder,
    model_arguments,
    read_train_options,
)
from kernelbank.errors import InputError, UsageError, WorkerError, require
from kernelbank.files import sole_user, writable_folder
from kernelbank.records import CodeIdentity, Machine, RunRecord
from kernelbank.train.recipes import beside
from kernelbank.train.runs import OUTPUTS, Log, RunFolder

if TYPE_CHECKING:  # torch takes seconds to import: only once the options are known to be good
    from kernelbank.data.dataset import Dataset
    from kernelbank.records import EpochResult
    from kernelbank.train.engine import Engine
    from kernelbank.train.loop import Metrics, StepTold
    from kernelbank.train.model import ModelSpec
    from kernelbank.train.progress import Watch

NEEDED = ("timm", "torchvision", "accelerate", "safetensors", "sklearn")
# what identifies a run: a resume must agree on it
IDENTITY = ("model", "start", "data", "recipe", "seed")

ENLARGED = 2
"""How many times an image is enlarged, at least, where a run says so."""


def train_main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises InputError before anything runs."""
    options = read_train_options(argv)
    if options.show:
        _show_recipe(options)
        return 0
    require("train", "train", *NEEDED)
    for name in options.tracker:
        require(f"tracker {name}", name, name)
    return _Training(*_resolved(options)).run()


def evaluate_main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = read_options(EvaluateOptions, "evaluate", argv)
    require("evaluate", "train", *NEEDED)
    from kernelbank.train.engine import Engine  # noqa: PLC0415
    from kernelbank.train.loop import evaluate  # noqa: PLC0415

    engine = Engine(options.hardware)
    with _notes_on(Console(stderr=True), engine.main):
        model, data, what = _evaluated(options, engine)
        split = {"val": data.val, "test": data.test, "train": data.train}[options.split]
        if split is None:
            raise InputError(f"split: {data.name} has no {options.split} split")
        model.to(engine.device)
        metrics = evaluate(model, split, engine=engine, batch_size=options.batch_size)
    if engine.main:
        _show_metrics(options, what, data.name, metrics)
    return 0


# ---- what the words mean -------------------------------------------------------------------------------------


def _resolved(options: TrainOptions) -> tuple[TrainOptions, RunFolder]:
    """The options as they were when the run began, where it is to go on without being told them again; and its
    folder. Raises UsageError and InputError."""
    if options.model:
        if options.source.data is None:
            raise UsageError("train", "--data is missing: a data set by name, a folder or an archive")
        mixed = options.model.replace("/", "-")
        return options, RunFolder(Path(options.out or f"runs/{mixed}-{options.recipe}-seed{options.seed}"))
    if not options.resume or options.out is None:
        raise UsageError("train", "a model is missing; without one, --resume --out FOLDER goes on with a run")
    folder = RunFolder(Path(options.out))
    kept = folder.read_config()["options"]
    return replace(
        options,
        model=kept["model"],
        recipe=kept["recipe"],
        seed=kept["seed"],
        weights=_rebuilt(ModelOptions, kept["weights"]),
        source=replace(_rebuilt(DataOptions, kept["source"]), workers=options.source.workers),
        settings=_rebuilt(type(options.settings), kept["settings"]),
    ), folder


def _rebuilt(kind: type[Any], document: dict[str, Any]) -> Any:
    """A dataclass from its JSON, lists as the tuples that they were."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})


def _size(model: str, options: DataOptions) -> tuple[int, int, int]:
    from kernelbank.train.model import expected_input  # noqa: PLC0415

    channels, height, width = expected_input(model)[0]
    return (channels, options.img_size or height, options.img_size or width)


def _open(model: str, options: DataOptions, crop_pct: float, engine: Engine, console: Console) -> Dataset:
    """The data, unpacked by the first process of every machine while the others wait. Raises InputError."""
    from kernelbank.data.images import Loading  # noqa: PLC0415
    from kernelbank.data.load import open_data  # noqa: PLC0415
    from kernelbank.train.model import expected_input  # noqa: PLC0415

    assert options.data is not None
    for name, least in (("workers", 0), ("max_broken", 0), ("img_size", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value} is not legal; legal: at least {least}")
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    _, mean, std = expected_input(model)
    loading = Loading(size=_size(model, options), mean=mean, std=std, crop_pct=crop_pct, workers=workers,
                      max_broken=options.max_broken)  # fmt: skip
    with engine.accelerator.local_main_process_first(), _unpacking(console, engine.main) as progress:
        return open_data(
            options.data, loading, cache=cache_folder(options), download=options.download, progress=progress
        )


@contextmanager
def _unpacking(console: Console, shown: bool) -> Iterator[Any]:
    """A bar for an archive, from the first block that is read."""
    with ExitStack() as stack:
        bars: list[tuple[Progress, Any]] = []

        def told(done: int, size: int) -> None:
            if not shown:
                return
            if not bars:
                bar = stack.enter_context(Progress(console=console, transient=True))
                bars.append((bar, bar.add_task("reading", total=size)))
            bars[0][0].update(bars[0][1], completed=done)

        yield told


def _model_spec(name: str, weights: ModelOptions, source: DataOptions, data: Dataset) -> ModelSpec:
    from kernelbank.data.load import DATASETS  # noqa: PLC0415
    from kernelbank.train.model import ModelSpec, check_model  # noqa: PLC0415

    check_model(name)
    in_memory = source.data in DATASETS
    side = data.img_size[0] if in_memory else source.img_size
    return ModelSpec(
        name=name, mixer=weights.mixer, mlp=weights.mlp, arguments=model_arguments(weights.model_args),
        num_classes=data.num_classes, in_chans=data.in_chans, img_size=side,
    )  # fmt: skip


def _enlarged(data: Dataset, source: DataOptions) -> Iterator[str]:
    """A line where images are enlarged to the size that the model happens to have."""
    from kernelbank.data.images import FileSplit  # noqa: PLC0415

    size = data.train.first_size() if isinstance(data.train, FileSplit) and source.img_size is None else None
    if size is not None and ENLARGED * min(size) <= min(data.img_size):
        there, seen = (f"{height} x {width}" for height, width in (size, data.img_size))
        yield f"the images are {there} (the first one) and enlarged to the model's {seen}; --img-size N sets another"


# ---- train ---------------------------------------------------------------------------------------------------


class _Training:
    """A run from its options to its record."""

    def __init__(self, options: TrainOptions, folder: RunFolder) -> None:
        from kernelbank.train.engine import Engine  # noqa: PLC0415
        from kernelbank.train.model import Start, check_model  # noqa: PLC0415

        check_model(options.model)
        self.options, self.folder, self.recipe = options, folder, options.settings
        self.start = Start(options.weights.initial_checkpoint, options.weights.pretrained)
        self.engine = Engine(options.hardware, options.tracker, folder.path)
        self.console = Console(stderr=True)

    def run(self) -> int:
        """Train, or go on; returns the exit code. Raises InputError, OSError and WorkerError."""
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
                    self._last_words(finished)
                    return 0
            self.log = stack.enter_context(_closing(Log(self.folder))) if main else None
            stack.enter_context(_notes_on(self.console, main, self.log))
            return self._trained()

    def _check_folder(self) -> None:
        """Clear what a run left that ended before its first checkpoint. Raises InputError where a run would be lost, or
        where there is none to go on with."""
        folder, there = self.folder, self.folder.config.exists()
        if there and not self.options.resume:
            if not any(path.exists() for path in (folder.checkpoint, folder.record)):
                folder.config.unlink()
                folder.log.unlink(missing_ok=True)
                return
            raise InputError(f"out: {self.folder.path} holds a run; legal: --resume to go on with it, another --out")
        if self.options.resume and not there:
            raise InputError(f"resume: {self.folder.path} holds no run; legal: the folder of one, or no --resume")

    def _trained(self) -> int:
        from kernelbank.train.loop import DivergedError, Stopped, evaluate, train  # noqa: PLC0415
        from kernelbank.train.model import create  # noqa: PLC0415
        from kernelbank.train.progress import watch  # noqa: PLC0415
        from kernelbank.train.signals import wish_to_stop  # noqa: PLC0415
        from kernelbank.train.tracking import tracking  # noqa: PLC0415

        options, engine, recipe = self.options, self.engine, self.recipe
        data = _open(options.model, options.source, recipe.crop_pct, engine, self.console)
        self.spec = _model_spec(options.model, options.weights, options.source, data)
        model, notes = create(self.spec, self.start, seed=options.seed, drop_path=recipe.drop_path)
        record = self._record(model, data)
        document = self._document(record)
        if engine.main:
            self._compare(document)
        settings = {"model": record.skeleton, "mixer": record.mixer, "data": data.name, "seed": record.seed,
                    **record.recipe}  # fmt: skip
        failure, test = None, None
        with (
            tracking(engine, self.folder.path, document["id"], settings) as self.track,
            wish_to_stop(self._interject if engine.main else None) as wish,
            watch(self.console, recipe.epochs, engine.main) as shown,
        ):
            if engine.main and not self.folder.config.exists():
                self.folder.write_config(document)
            if shown:
                self._introduce(shown, record, data, notes)
            self.shown = shown
            self.logged = {e["epoch"] for e in self.folder.events() if e["event"] == "epoch"} if engine.main else set()
            self.epochs: list[EpochResult] = []
            try:
                train(model, data, recipe, seed=options.seed, engine=engine, checkpoint=self.folder.checkpoint,
                      on_epoch=self._on_epoch, on_step=self._on_step, stop=wish)  # fmt: skip
                test = evaluate(model, data.test, engine=engine) if data.test is not None else None
            except Stopped as stopped:
                self._tell("stopped", message=str(stopped))
                if engine.main:
                    again = f"kernelbank train --resume --out {self.folder.path}"
                    print(f"kernelbank train: {stopped}; go on with: {again}", file=sys.stderr)
                return wish.exit_code
            except DivergedError as diverged:
                failure = str(diverged)
                self._tell("diverged", message=failure)
                record = replace(record, epochs=tuple(self.epochs), failure=failure)
                if engine.main:
                    record.save(self.folder.record)
                kept = (
                    f"the last good checkpoint is {diverged.last_good}"
                    if diverged.last_good
                    else "there is no checkpoint"
                )
                raise WorkerError(f"{failure}; {kept}") from None
        record = replace(
            record,
            epochs=tuple(self.epochs),
            test_loss=None if test is None else test.loss,
            test_top1=None if test is None else test.top1,
        )
        self._finish(model, record)
        return 0

    def _record(self, model: Any, data: Dataset) -> RunRecord:
        """The record of the run before its first epoch."""
        import torch  # noqa: PLC0415

        from kernelbank.train.model import multiply_adds, records_of  # noqa: PLC0415

        mixer, mlp = records_of(model)
        gpu = torch.cuda.get_device_name(self.engine.device) if self.engine.device.type == "cuda" else None
        return RunRecord(
            study="train", row=self.folder.path.name, skeleton=self.spec.name,
            sizes={**self.spec.arguments, "img_size": data.img_size[0]},
            mixer=mixer or "", mlp=mlp or "", recipe=json.loads(json.dumps(asdict(self.recipe))),
            data=data.identity, seed=self.options.seed, code=CodeIdentity.here(),
            machine=Machine.here(torch.get_num_threads(), gpu, self.engine.part.world),
            params=sum(parameter.numel() for parameter in model.parameters()),
            macs=multiply_adds(model, self.spec, data.img_size),
            epochs=(), test_loss=None, test_top1=None, failure=None,
        )  # fmt: skip

    def _document(self, record: RunRecord) -> dict[str, Any]:
        """What run.json keeps of the run; its id is that of the run.json that is there."""
        options = self.options
        said = ("model", "recipe", "seed", "weights", "source", "settings")
        kept = self.folder.read_config() if self.folder.config.exists() else {}
        document = {
            "id": kept.get("id", uuid4().hex[:8]),
            "model": asdict(self.spec),
            "start": asdict(self.start),
            "recipe": asdict(self.recipe),
            "seed": options.seed,
            "data": asdict(record.data),
            "record": asdict(record),
            "hardware": asdict(options.hardware),
            "options": {name: _plain(getattr(options, name)) for name in said},
        }
        return cast("dict[str, Any]", json.loads(json.dumps(document)))

    def _compare(self, document: dict[str, Any]) -> None:
        """Raises InputError where the folder's run is another one, naming what differs."""
        from kernelbank.train.checkpoint import differences  # noqa: PLC0415

        if not self.folder.config.exists():
            return
        kept = self.folder.read_config()
        found, expected = ({name: side.get(name) for name in IDENTITY} for side in (kept, document))
        if found != expected:
            raise InputError(f"resume: {self.folder.path} holds another run: {differences(found, expected)}")

    def _introduce(self, shown: Watch, record: RunRecord, data: Dataset, notes: list[str]) -> None:
        options, engine = self.options, self.engine
        recipe, world = self.recipe, engine.part.world
        processes = f"{world} processes, {options.hardware.parallel}" if world > 1 else "one process"
        where = f"{engine.device.type}, {processes}, {engine.accelerator.mixed_precision.replace('no', 'float32')}"
        mixer = f" mixer {record.mixer!r}" if record.mixer else ""
        for note in [*notes, *_enlarged(data, options.source)]:
            shown.say(note)
        shown.say(
            f"{record.skeleton}{mixer}: {record.params / 1e6:.2f} M parameters, {record.macs / 1e9:.3g} G multiply-adds"
        )
        shown.say(f"{data.name}: {len(data.train)} training, {len(data.val)} validation, "
                  f"{0 if data.test is None else len(data.test)} test images, {data.num_classes} classes")  # fmt: skip
        shown.say(f"recipe {options.recipe}: {recipe.epochs} epochs, batch {recipe.batch_size}, "
                  f"lr {recipe.rates.top:.3g}; {where}; {self.folder.path}")  # fmt: skip

    @staticmethod
    def _interject(line: str) -> None:
        print(f"kernelbank train: {line}", file=sys.stderr, flush=True)

    def _on_epoch(self, result: EpochResult, restored: bool) -> None:
        self.epochs.append(result)
        if self.shown:
            self.shown.epoch(result, restored)
        number = len(self.epochs)
        if number not in self.logged:  # a process killed between checkpoint and log left one out
            self._tell("epoch", epoch=number, **asdict(result))
        if not restored:
            told = {name: value for name, value in asdict(result).items() if value is not None}
            self.track(told, number)

    def _on_step(self, told: StepTold) -> None:
        if self.shown:
            self.shown.step(told)
        self._tell("step", **asdict(told))

    def _tell(self, event: str, **values: Any) -> None:
        if self.log is not None:
            self.log(event, **values)

    def _finish(self, model: Any, record: RunRecord) -> None:
        """Weights, record, and the last words; the checkpoint is kept: it is the last good state."""
        from kernelbank.train.export import write_weights  # noqa: PLC0415

        cast(Any, self.engine.accelerator).end_training()
        write_weights(self.folder, self.spec, record, main=self.engine.main)
        if not self.engine.main:
            return
        record.save(self.folder.record)
        self._tell("end", test_loss=record.test_loss, test_top1=record.test_top1)
        self._last_words(record)

    def _last_words(self, record: RunRecord) -> None:
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
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


@contextmanager
def _closing(log: Log) -> Iterator[Log]:
    try:
        yield log
    finally:
        log.close()


class _Lines(logging.Handler):
    """Warnings of the package as lines, and in the log."""

    def __init__(self, console: Console, log: Log | None) -> None:
        super().__init__(logging.WARNING)
        self.console, self.log = console, log

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)
        if self.log is not None:
            self.log("warning", message=record.getMessage())


@contextmanager
def _notes_on(console: Console, shown: bool, log: Log | None = None) -> Iterator[None]:
    logger, handler = logging.getLogger("kernelbank"), _Lines(console, log)
    if shown:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _show_recipe(options: TrainOptions) -> None:
    table = Table("field", "value", "origin", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in beside(options.recipe, options.settings):
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


# ---- evaluate ------------------------------------------------------------------------------------------------


def _evaluated(options: EvaluateOptions, engine: Engine) -> tuple[Any, Dataset, str]:
    """(model, data, what it is). Raises InputError."""
    console = Console(stderr=True)
    folder = RunFolder(Path(options.model))
    if folder.config.exists():
        return _run_model(options, folder, engine, console)
    from kernelbank.train.model import Start, check_model, create  # noqa: PLC0415

    check_model(options.model)
    start = Start(options.weights.initial_checkpoint, options.weights.pretrained)
    if not start.given:
        raise UsageError("evaluate", f"{options.model} is no folder of a run, and as a model it has no weights; "
                                     "legal: --initial-checkpoint FILE or --pretrained")  # fmt: skip
    if options.source.data is None:
        raise UsageError("evaluate", "--data is missing: a data set by name, a folder or an archive")
    data = _open(options.model, options.source, options.crop_pct or 0.875, engine, console)
    spec = _model_spec(options.model, options.weights, options.source, data)
    model, notes = create(spec, start, seed=0)
    if new := [note for note in notes if note.endswith(": new")]:
        raise InputError(f"evaluate: the weights do not have the classes of {data.name}: {new[0]}")
    return model, data, options.model


def _run_model(
    options: EvaluateOptions, folder: RunFolder, engine: Engine, console: Console
) -> tuple[Any, Dataset, str]:
    from kernelbank.train.export import read_run_weights  # noqa: PLC0415
    from kernelbank.train.model import ModelSpec, Start, create  # noqa: PLC0415

    config = folder.read_config()
    kept = _rebuilt(DataOptions, config["options"]["source"])
    given = {f.name: getattr(options.source, f.name) for f in fields(DataOptions)}
    changed = {name: value for name, value in given.items() if value != getattr(DataOptions(), name)}
    source = replace(kept, **changed)
    spec = ModelSpec(**config["model"])
    crop = options.crop_pct or config["recipe"]["crop_pct"]
    data = _open(spec.name, source, crop, engine, console)
    if data.num_classes != spec.num_classes:
        raise InputError(f"evaluate: {folder.path} has {spec.num_classes} classes, {data.name} has {data.num_classes}")
    model, _ = create(replace(spec, mixer=config["record"]["mixer"] or None), Start(), seed=0)
    what = read_run_weights(folder, model, options.ema)
    return model, data, f"{folder.path} ({what})"


def _show_metrics(options: EvaluateOptions, what: str, data: str, metrics: Metrics) -> None:
    if options.json:
        print(json.dumps({"model": what, "data": data, "split": options.split, **asdict(metrics)}, indent=1))
        return
    unreadable = f"; {metrics.unreadable} unreadable images are not among them" if metrics.unreadable else ""
    print(f"{what} on {data} {options.split}: top-1 {metrics.top1:.2f}, top-5 {metrics.top5:.2f}, "
          f"loss {metrics.loss:.4f} over {metrics.count} images{unreadable}")  # fmt: skip
