"""`RunRecord`: the results of one training run and what identifies it, in one JSON file. Imports no torch.

Run records are read strictly: unknown, missing or mistyped fields are errors, and so are truncated files. Percentages
and losses are stored unrounded. Numbers that are not finite are stored as "nan", "inf" or "-inf", so that the file is
valid JSON for every reader.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kernelbank
from kernelbank.errors import InputError
from kernelbank.files import read_json, replace_text
from kernelbank.model import ModelSpec, SwinTrunk, Trunk, ViTTrunk
from kernelbank.schema import decode, encode
from kernelbank.zoo import NAMED

RECORD_VERSION = 2


class RecordError(InputError):
    """A file that is not a run record. The message names the file and the reason."""


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    They are the mean training loss, the validation loss, top-1 and top-5 (per cent) after the epoch, the duration in
    seconds with validation, the last learning rate, the top-1 of the averaged weights if there are any, the number of
    training images that could not be read so far, and the seconds spent waiting for images.
    """

    train_loss: float
    val_loss: float
    val_top1: float
    seconds: float
    val_top5: float | None = None
    lr: float | None = None
    ema_top1: float | None = None
    broken: int = 0
    waited: float | None = None


@dataclass(frozen=True)
class DataIdentity:
    """The identity of a data set. The SHA-256 is that of `Dataset.sha256`, which covers the splits."""

    name: str
    sha256: str
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class CodeIdentity:
    """The identity of the code: the version of the package, the SHA-256 of its ``*.py`` files, and the git commit if it
    is a checkout."""

    version: str
    sources: str
    commit: str | None

    @staticmethod
    @cache
    def here() -> CodeIdentity:
        """The identity of the running package."""
        folder, digest = Path(kernelbank.__file__).parent, hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return CodeIdentity(kernelbank.__version__, digest.hexdigest(), _commit(folder))


def _commit(folder: Path) -> str | None:
    """Return HEAD if git tracks this package; an installed copy may be inside another checkout."""
    try:
        for arguments in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"]):
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class GpuSettings:
    """What decides a GPU's numbers besides the device: the versions of CUDA and cuDNN, how products and convolutions of
    float32 are computed ("tf32", "ieee", or "none" for torch's default), whether cuDNN times its algorithms and takes
    the fastest, and whether algorithms are deterministic."""

    cuda: str | None
    cudnn: int | None
    matmul_precision: str
    conv_precision: str
    cudnn_benchmark: bool
    deterministic: bool


@dataclass(frozen=True)
class MachineIdentity:
    """Where a run was computed: processor, cores, versions, the threads of torch, the accelerator if there was one, how
    many processes shared the work, and the settings of a GPU."""

    cpu: str
    cores: int
    torch: str
    python: str
    threads: int
    accelerator: str | None = None
    processes: int = 1
    settings: GpuSettings | None = None

    @staticmethod
    def here(
        threads: int, accelerator: str | None = None, processes: int = 1, settings: GpuSettings | None = None
    ) -> MachineIdentity:
        """The running machine."""
        versions = version("torch"), platform.python_version()
        return MachineIdentity(_cpu(), os.cpu_count() or 1, *versions, threads, accelerator, processes, settings)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of a study (`row` is its row) or of ``kernelbank train`` (`study` is ``train``, `row` the name of its
    folder). `model` is the model as it was trained, with the mixers it had in the end. `macs` are the multiply-adds of
    one image in closed form, all products counted (`analysis.cost`); `linear_form` is how linear layers were computed,
    `images` where training images were augmented: as they were read from ``files``, or by the batch on the ``device``
    (None: in memory).
    `start` names the run from whose weights it started, and `start_top1` is its validation top-1 before the first
    update (None: from weights that were drawn).
    `test_*` are read once, after the last epoch. A run that diverged has a `failure`, the epochs before it, and no test
    numbers."""

    study: str
    row: str
    model: ModelSpec
    recipe: dict[str, Any]
    data: DataIdentity
    seed: int
    code: CodeIdentity
    machine: MachineIdentity
    params: int
    macs: int
    epochs: tuple[EpochResult, ...] = ()
    test_loss: float | None = None
    test_top1: float | None = None
    failure: str | None = None
    linear_form: str = "linear"
    images: str | None = None
    start: str | None = None
    start_top1: float | None = None

    @property
    def mixer(self) -> str:
        """The specs of the mixers as text; empty for a stock model that keeps its own."""
        return self.model.mixer or ""

    @property
    def mlp(self) -> str:
        """The specs of the MLPs as text; empty for a stock model."""
        return self.model.mlp or ""

    @property
    def best_val_top1(self) -> float | None:
        """The highest validation top-1 of any epoch."""
        return max((epoch.val_top1 for epoch in self.epochs), default=None)

    @property
    def seconds(self) -> float:
        """The time of all epochs, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)

    def to_document(self) -> dict[str, Any]:
        """The run record as plain JSON values, with a ``record_version``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}
        plain = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in values.items()
        }
        plain["epochs"] = [asdict(epoch) for epoch in self.epochs]
        return {"record_version": RECORD_VERSION, "model": self.model.to_document(), **encode(plain)}

    def to_json(self) -> str:
        """`to_document` as text with sorted keys."""
        return json.dumps(self.to_document(), sort_keys=True, indent=1, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the run record to `path`, completely or not at all."""
        replace_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read the run record at `path`. Raises RecordError for a file that is damaged, of another version, or not a
        run record."""
        try:
            return cls.from_document(read_json(path))
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} is not a run record: {error}") from None

    @classmethod
    def from_document(cls, document: object) -> RunRecord:
        """Read the run record of a JSON object. Raises ValueError naming the invalid field."""
        if not isinstance(document, Mapping):
            raise ValueError(f"expected a JSON object, got {type(document).__name__}")
        values = dict(document)
        version = values.pop("record_version", None)
        if version == 1:
            values = _from_version_1(values)
        elif version != RECORD_VERSION:
            raise ValueError(f"invalid record_version={version!r}; expected {RECORD_VERSION}")
        return decode(cls, values, "record")


def check_numbers(record: RunRecord) -> None:
    """Check the numbers of a run record that is compared with others.

    Raises ValueError, naming the field, for accuracies outside 0 to 100, for other numbers that are negative or not
    finite, and for a recipe without epochs or learning rate.
    """
    if type(record.recipe.get("epochs")) is not int or type(record.recipe.get("lr")) not in (int, float):
        raise ValueError("invalid recipe; expected numbers as its epochs and lr")
    numbers: dict[str, tuple[float | None, float]] = {
        "params": (record.params, math.inf),
        "macs": (record.macs, math.inf),
        "recipe.lr": (record.recipe["lr"], math.inf),
        "test_top1": (record.test_top1, 100.0),
    }
    for index, epoch in enumerate(record.epochs):
        place = f"epochs[{index}]"
        numbers[f"{place}.val_top1"] = epoch.val_top1, 100.0
        numbers[f"{place}.train_loss"] = epoch.train_loss, math.inf
        numbers[f"{place}.seconds"] = epoch.seconds, math.inf
    for name, (value, most) in numbers.items():
        if value is not None and not (math.isfinite(value) and 0 <= value <= most):
            limits = "a finite number >= 0" if most == math.inf else f"0 to {most:g}"
            raise ValueError(f"invalid {name}={value}; expected {limits}")


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run record of version 1, which stated the model by its name and the sizes of its trunk."""
    try:
        name, sizes = values.pop("skeleton"), dict(values.pop("sizes"))
        mixer, mlp, digits = values.pop("mixer"), values.pop("mlp"), values["data"]["name"] == "digits"
        if name not in NAMED:
            raise ValueError(f"invalid skeleton={name!r} in a run record of version 1")
        base = NAMED[name]
        side, patch = sizes.pop("img_size", base.image[0]), sizes.pop("patch_size", 16)
        sizes.pop("window_size", None)
        heads, depths = sizes.pop("num_heads"), sizes.pop("depths")
        width = sizes.pop("dim", None) or sizes.pop("embed_dim")
        trunk: Trunk
        if isinstance(base.trunk, ViTTrunk):
            trunk = replace(base.trunk, patch_size=(patch, patch), embed_dim=width, depth=depths[0], num_heads=heads[0],
                            **sizes)  # fmt: skip
        else:
            trunk = SwinTrunk(patch_size=(patch, patch), embed_dim=width, depths=tuple(depths), num_heads=tuple(heads))
        model = ModelSpec(trunk=trunk, mixer=mixer, mlp=mlp, img_size=(side, side), in_chans=1 if digits else 3,
                          num_classes=10, name=name)  # fmt: skip
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"invalid run record of version 1 ({type(error).__name__}: {error})") from None
    return {**values, "model": model.to_document()}
