"""RunRecord: one training run as numbers, with everything that identifies it, in one JSON file. Imports no torch.

A record is strict: an unknown, missing or mistyped field is an error, a file cut in the middle too. Percentages
and losses are stored unrounded; a number that is not finite is stored as "nan", "inf" or "-inf", so that the
file is plain JSON everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import kernelbank
from kernelbank.errors import InputError
from kernelbank.files import replace_text

RECORD_VERSION = 1


class RecordError(InputError):
    """A file that is not a record: the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch: the mean training loss of its images, the validation loss, top-1 and top-5 (per cent) after it, how
    long all took, the last learning rate, the top-1 of the averaged weights if there are any, and how many training
    images could not be read so far, and how long it waited for images."""

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
    """Which data: the SHA-256 is over the raw arrays in the order of the splits, so it pins the split too."""

    name: str
    sha256: str
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class CodeIdentity:
    """Which code: package version, SHA-256 over the package's ``*.py`` files, git commit if it is a checkout."""

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
    """HEAD, only where git tracks this very package (an installed copy may lie inside somebody's checkout)."""
    try:
        for arguments in (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"]):
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Machine:
    """Where it ran: processor, cores, versions, the threads that torch was given, the accelerator if there was one,
    and how many processes shared the work."""

    cpu: str
    cores: int
    torch: str
    python: str
    threads: int
    accelerator: str | None = None
    processes: int = 1

    @staticmethod
    def here(threads: int, accelerator: str | None = None, processes: int = 1) -> Machine:
        """The running machine."""
        versions = version("torch"), platform.python_version()
        return Machine(_cpu(), os.cpu_count() or 1, *versions, threads, accelerator, processes)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, of a study or of ``kernelbank train`` (`study` ``train``, `row` its folder's name, `skeleton` its
    model, `sizes` what the model was built with). `mixer` and `mlp` are records as text; `test_*` are read once, after
    the last epoch. A run that diverged has a `failure`, the epochs before it, and no test numbers."""

    study: str
    row: str
    skeleton: str
    sizes: dict[str, Any]
    mixer: str
    mlp: str
    recipe: dict[str, Any]
    data: DataIdentity
    seed: int
    code: CodeIdentity
    machine: Machine
    params: int
    macs: int
    epochs: tuple[EpochResult, ...]
    test_loss: float | None
    test_top1: float | None
    failure: str | None

    @property
    def best_val_top1(self) -> float | None:
        """The highest validation top-1 of any epoch."""
        return max((epoch.val_top1 for epoch in self.epochs), default=None)

    @property
    def seconds(self) -> float:
        """The time of all epochs, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)

    def to_json(self) -> str:
        """The record as JSON with sorted keys and a ``record_version``."""
        document = {"record_version": RECORD_VERSION, **_encode(asdict(self))}
        return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the record: the file at `path` is whole or was never there."""
        replace_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """The record at `path`. Raises RecordError for a file that is cut, foreign, or of another version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise ValueError(f"a JSON object is expected, not {type(document).__name__}")
            found = document.pop("record_version", None)
            if found != RECORD_VERSION:
                raise ValueError(f"record_version {found}; legal: {RECORD_VERSION}")
            return cls.from_document(document)
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} is not a run record: {error}") from None

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> RunRecord:
        """The record whose fields are in `document`. Raises ValueError naming what is wrong."""
        record = _decode(cls, document, "record")
        assert isinstance(record, cls)
        return record


# ---- values to JSON and back -------------------------------------------------------------------------------

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _encode(inner) for key, inner in value.items()}
    return [_encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _decode(kind: Any, value: Any, name: str) -> Any:
    """`value` as a `kind`. Raises ValueError naming the field."""
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _decode_fields(kind, value, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(inner[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return value
    if origin in (types.UnionType, Union):
        return None if value is None else _decode(inner[0], value, name)
    if kind is float and isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} is not legal; legal: {getattr(kind, '__name__', kind)}")
    return value


def _decode_fields(kind: type, value: dict[str, Any], name: str) -> Any:
    hints, names = get_type_hints(kind), [f.name for f in fields(kind)]
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    if unknown := sorted(set(value) - set(names)):
        raise ValueError(f"{name} has an unknown field {unknown[0]!r}")
    if missing := [field for field in needed if field not in value]:
        raise ValueError(f"{name} lacks the field {missing[0]!r}")
    return kind(**{field: _decode(hints[field], value[field], f"{name}.{field}") for field in names if field in value})
