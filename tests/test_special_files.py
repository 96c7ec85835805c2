"""Pipes and devices in the place of files are errors, and are not opened: a pipe without a writer is waited for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_records import RECORD

from kernelbank.cli import main
from kernelbank.data.archive import unpacked
from kernelbank.data.images import Loading
from kernelbank.data.load import open_data
from kernelbank.errors import InputError
from kernelbank.explanation.picture import read_picture
from kernelbank.explanation.subject import read_classes
from kernelbank.files import read_json, regular_file
from kernelbank.records import RecordError, RunRecord
from kernelbank.train import checkpoint
from kernelbank.train.runs import Log, RunFolder, read_run
from kernelbank.weights.file import read_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes in folders")
SECONDS = 20


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Fail a test that waits for a pipe."""

    def fail(*_: object) -> None:
        raise TimeoutError("a pipe was opened")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


Pipe = Callable[[str], Path]
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an image": ("a.png", lambda path: read_picture(path, (8, 8), 3)),
    "names of classes": ("names.txt", read_classes),
    "weights": ("a.safetensors", read_state),
    "a pickle": ("a.pth", read_state),
    "a run record": ("record.json", RunRecord.load),
    "the record of a run": ("record.json", lambda path: read_run(path.parent)),
    "the configuration of a run": ("run.json", lambda path: RunFolder(path.parent).read_config()),
    "a log that is written": ("log.jsonl", lambda path: Log(RunFolder(path.parent))),
    "a checkpoint": ("checkpoint.safetensors", checkpoint.read),
    "an archive": ("a.tar", lambda path: unpacked(path, path.parent / "cache")),
    "a tar of a split": ("train.tar", lambda path: open_data(str(path.parent), Loading(), cache=path.parent)),
    "a shard": ("train-0.tar", lambda path: open_data(f"wds/{path.parent}", Loading(), cache=path.parent)),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_an_error(pipe: Pipe, reader: str) -> None:
    name, read = READERS[reader]
    with pytest.raises((InputError, RecordError, OSError), match=r"regular file|not a file"):
        read(pipe(name))


def test_a_device_is_an_error() -> None:
    for read in (read_json, regular_file, read_classes, lambda path: read_picture(path, (8, 8), 3)):
        with pytest.raises((InputError, OSError), match="expected a regular file"):
            read(Path(os.devnull))
        with pytest.raises((InputError, OSError), match="expected a regular file"):
            read(Path("/dev/zero"))


def test_what_is_missing_is_not_said_to_be_a_pipe(tmp_path: Path) -> None:
    assert regular_file(tmp_path / "none.json") == tmp_path / "none.json"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_pipe_among_images_is_counted_as_broken(pipe: Pipe, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in range(2):
            for index in range(3):
                folder = tmp_path / "data" / split / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"{index}.png")
    place = pipe("data/train/class0/9.png")
    source = open_data(str(tmp_path / "data"), Loading(size=(3, 8, 8), workers=0), cache=tmp_path).train.source  # type: ignore[attr-defined]
    (row,) = [row for row in range(len(source)) if source.name(row).endswith("9.png")]
    with pytest.raises(OSError, match=f"{place} is a pipe or a device"):
        source.open(row)


def test_the_command_line_says_so(pipe: Pipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RECORD.save(tmp_path / "whole.json")
    image, record = pipe("a.png"), pipe("a.json")
    weights, pickled = pipe("a.safetensors"), pipe("b.pth")
    for words in (
        ["explain", "vit_kb_test_patch16_64", image],
        ["compare", record, tmp_path / "whole.json"],
        ["explain", weights, image],
        ["convert", pickled, "b.safetensors"],
    ):
        assert main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("kernelbank: error: ")
