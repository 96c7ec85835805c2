"""WebDataset shards read by row: the same images as in folders, one line for what cannot be read."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kernelbank.cli import main
from kernelbank.data import shards
from kernelbank.data.augment import Augmentation
from kernelbank.data.dataset import UNREADABLE
from kernelbank.data.images import BrokenImagesError, Loading
from kernelbank.data.load import open_data
from kernelbank.data.order import Part, Share, in_order
from kernelbank.data.shards import braces, sharded_splits
from kernelbank.errors import InputError
from kernelbank.records import RunRecord

AUGMENT = Augmentation(scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5, erase=0.5)


def png(seed: int) -> bytes:
    pixels, file = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def files(rows: range) -> dict[str, bytes]:
    """Samples of two classes."""
    found: dict[str, bytes] = {}
    for row in rows:
        found |= {f"{row:04}.cls": str(row % 2).encode(), f"{row:04}.json": b"{}", f"{row:04}.png": png(row)}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Train in three shards of 8, validation in one; and a file that is no sample."""
    for index in range(3):
        shard(tmp_path / "pets" / f"pets-train-{index:02}.tar", files(range(8 * index, 8 * index + 8)))
    shard(tmp_path / "pets" / "pets-validation-00.tar", {"LICENSE.txt": b"free"} | files(range(24, 35)))
    return tmp_path / "pets"


def opened(text: Any, cache: Path, workers: int = 0, **loading: Any) -> Any:
    return open_data(f"wds/{text}", Loading(size=(3, 16, 16), workers=workers, **loading), cache=cache)


# ---- what works ----------------------------------------------------------------------------------------------


def test_shards_hold_what_folders_hold(folder: Path, tmp_path: Path) -> None:
    for split, rows in (("train", range(24)), ("val", range(24, 35))):
        for row in rows:
            path = tmp_path / "loose" / split / str(row % 2) / f"{row:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(row))
    loose = open_data(str(tmp_path / "loose"), Loading(size=(3, 16, 16), workers=0), cache=tmp_path)
    data = opened(folder, tmp_path)
    assert (data.name, data.num_classes, len(data.train), len(data.val), data.test) == ("wds/pets", 2, 24, 11, None)
    assert data.train.source.classes == loose.train.source.classes == ("0", "1")  # type: ignore[attr-defined]
    for split in ("train", "val"):
        in_shards, in_files = (
            {image.numpy().tobytes(): int(label)
             for images, labels in getattr(each, split).batches(in_order(len(getattr(each, split)), 8, Part()), None)
             for image, label in zip(images, labels, strict=True)} for each in (data, loose)
        )  # fmt: skip
        assert in_shards == in_files and len(in_files) == len(getattr(data, split))


def test_an_image_of_a_shard_follows_from_its_seed_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    rows, seeds = np.random.default_rng(0).permutation(24), np.arange(24) * 7
    many = [Share(rows[at : at + 5], seeds[at : at + 5], 5) for at in range(0, 24, 5)]
    one, two = (
        torch.cat([images for images, _ in opened(folder, tmp_path, workers).train.batches(many, AUGMENT)])
        for workers in (0, 2)
    )
    assert torch.equal(one, two)
    labels = torch.cat([labels for _, labels in opened(folder, tmp_path).train.batches(many, None)])
    assert labels.tolist() == (rows % 2).tolist()


@pytest.mark.parametrize("pattern", ["pets-train-{00..02}.tar", "pets-train-*.tar", "pets-{train-0{0,1,2}}.tar"])
def test_a_pattern_of_shards_and_no_validation(folder: Path, tmp_path: Path, pattern: str) -> None:
    data = opened(folder / pattern, tmp_path)
    assert (len(data.train), len(data.val)) == (22, 2)
    assert not set(data.train.rows) & set(data.val.rows)


def test_both_splits_by_one_pattern(folder: Path, tmp_path: Path) -> None:
    data = opened(folder / "pets-{train,validation}-*.tar", tmp_path)
    assert (len(data.train), len(data.val)) == (24, 11)


def test_braces_are_a_shells() -> None:
    assert list(braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(braces("{x,y}{0..1}")) == ["x0", "x1", "y0", "y1"]
    assert list(braces("plain")) == ["plain"]


def test_timms_info_says_the_splits(folder: Path, tmp_path: Path) -> None:
    splits = {name: {"name": name, "filenames": found, "shard_lengths": [8] * len(found), "num_samples": 0}
              for name, found in (("train", ["pets-train-00.tar", "pets-train-02.tar"]), ("extra", ["no.tar"]),
                                  ("validation", ["pets-train-01.tar"]))}  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(InputError, match=r"_info\.json names no\.tar, which does not exist"):
        opened(folder, tmp_path)
    del splits["extra"]
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    data = opened(folder, tmp_path)
    assert (len(data.train), len(data.val)) == (16, 8)
    assert data.val.source.name(0) == "pets-train-01.tar/0008.png"


def test_the_index_is_kept_until_a_shard_changes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    first = sharded_splits(f"wds/{folder}", tmp_path, lambda done, size: told.append((done, size)))
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in folder.iterdir())
    (kept,) = tmp_path.glob("shards-*.json")
    with monkeypatch.context() as context:
        context.setattr(shards, "_samples", None)  # what is kept needs no look at the shards
        again = sharded_splits(f"wds/{folder}", tmp_path)
    assert again["train"].names == first["train"].names and (again["val"].offsets == first["val"].offsets).all()
    kept.write_text(kept.read_text()[:50])
    assert sharded_splits(f"wds/{folder}", tmp_path)["val"].labels == first["val"].labels
    shard(folder / "pets-train-01.tar", files(range(100, 102)))
    assert len(sharded_splits(f"wds/{folder}", tmp_path)["train"]) == 18


def test_a_run_on_shards_goes_on_bit_by_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelbank.train.progress import Watch

    words = ["train", "plain", "--data", f"wds/{folder}", "--img-size", "16", "--recipe", "cifar10", "--epochs", "2",
             "--warmup-epochs", "0", "--batch-size", "4", "--drop-path", "0.2", "--workers", "0", "--device", "cpu",
             "--cache", str(tmp_path / "cache")]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    real, seen = Watch.step, [0]

    def step(self: Watch, told: Any) -> None:
        seen[0] += 1
        if seen[0] == 8:  # inside the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, told)

    with monkeypatch.context() as context:
        context.setattr(Watch, "step", step)
        assert main([*words, "--out", str(tmp_path / "stopped")]) == 128 + signal.SIGTERM
    assert main(["train", "--resume", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "stopped")]) == 0
    whole, stopped = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    assert RunRecord.load(tmp_path / "stopped" / "record.json").data.train == 24


# ---- faults --------------------------------------------------------------------------------------------------


def test_a_broken_image_is_named_and_counted(folder: Path, tmp_path: Path) -> None:
    broken = files(range(8))
    broken["0003.png"] = broken["0003.png"][:60]
    shard(folder / "pets-train-00.tar", broken)
    rows = Share(np.arange(24), np.arange(24), 24)
    train = opened(folder, tmp_path, max_broken=0.1).train
    images, labels = next(iter(train.batches([rows], AUGMENT)))
    assert train.broken == {3: "pets-train-00.tar/0003.png"} and (labels != UNREADABLE).all() and len(images) == 24
    with pytest.raises(BrokenImagesError, match=r"1 of 24 images .* the first is pets-train-00\.tar/0003\.png"):
        list(opened(folder, tmp_path).train.batches([rows], AUGMENT))


def without(name: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        shard(path, {key: value for key, value in files(range(8)).items() if key != name})

    return harm


def with_label(text: bytes) -> Callable[[Path], None]:
    return lambda path: void(shard(path, files(range(8)) | {"0003.cls": text}))


def void(_: object) -> None:
    pass


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def packed(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


def twice(path: Path) -> None:
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("0003.cls"))


def empty(path: Path) -> None:
    for each in path.parent.iterdir():
        each.unlink()


def unnamed(path: Path) -> None:
    path.rename(path.with_name("more-00.tar"))


def no_train(path: Path) -> None:
    for each in path.parent.glob("*train*"):
        each.unlink()


def other_classes(path: Path) -> None:
    shard(path.with_name("pets-validation-00.tar"), files(range(24, 34)) | {"0024.cls": b"7"})


def no_info(path: Path) -> None:
    path.with_name("_info.json").write_text("{}")


def other_labels(path: Path) -> None:
    split = {"filenames": [path.name], "alt_label": "label"}
    path.with_name("_info.json").write_text(json.dumps({"splits": {"train": split}}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without("0003.png"), r"sample 0003 in .*pets-train-00\.tar has no image, only \.cls, \.json; expected \.jpg"),
        (without("0003.cls"), r"sample 0003 in .*pets-train-00\.tar has no label, only \.json, \.png; expected \.cls"),
        (with_label(b"cat"), r"0003\.cls in .*pets-train-00\.tar is b'cat'; expected a class number from 0 on"),
        (with_label(b"4"), r"class 2 of wds/.*pets holds no image \(2 of 5 are empty\)"),
        (cut, r"shard .*pets-train-00\.tar is not a whole tar file, uncompressed: unexpected end of data"),
        (packed, r"shard .*pets-train-00\.tar is not a whole tar file, uncompressed"),
        (twice, r"pets-train-00\.tar holds 0003\.cls twice"),
        (empty, r"pets holds no shard; expected wds/FOLDER with train-0000\.tar"),
        (unnamed, r"more-00\.tar names no split, others do; expected one of train, training, val"),
        (no_train, r"wds/.*pets has no train split, only val; expected wds/FOLDER"),
        (other_classes, r"pets val has 3 classes, the train split 2: 1 unknown \(7\)"),
        (no_info, r"_info\.json states no splits with filenames \(KeyError"),
        (other_labels, r"invalid alt_label='label'; expected labels in \.cls"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_used_are_one_line(
    harm: Callable[[Path], None], said: str, folder: Path, tmp_path: Path
) -> None:
    harm(folder / "pets-train-00.tar")
    with pytest.raises(InputError, match=said):
        opened(folder, tmp_path)


def test_a_shard_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    for text in (folder / "pets-train-{00..03}.tar", folder / "cats-*.tar", "https://example.org/train-{0..9}.tar"):
        with pytest.raises(InputError, match=r"there is no file .*\.tar; expected .*, on a local disk"):
            opened(text, tmp_path)


@pytest.mark.parametrize(("pattern", "said"), [
    ("x-{0..99999999999}.tar", "stands for 100000000000 shards; expected 1 to 1000000"),
    ("x-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar", "stands for 10000000 shards"),
    ("x-{a,{0..99999999999}}.tar", "stands for 100000000000 shards"),
    ("x-{9..0}.tar", "stands for 0 shards"),
    (f"x-{{1{'0' * 40}..1{'0' * 29}{'9' * 11}}}.tar", "expected numbers of at most 18 digits"),
    (f"x-{{0..{'9' * 200}}}.tar", "expected numbers of at most 18 digits"),
])  # fmt: skip
def test_a_pattern_of_too_many_shards_is_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, said: str
) -> None:
    def expanded(pattern: str) -> Any:
        raise AssertionError(f"{pattern} is expanded")

    monkeypatch.setattr(shards, "braces", expanded)
    with pytest.raises(InputError, match=said):
        opened(tmp_path / pattern, tmp_path)


def test_a_shard_that_may_not_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "_members", refused)  # a test may run as root, who reads everything
    with pytest.raises(InputError, match=r"shard .*\.tar cannot be read: Permission denied"):
        opened(folder, tmp_path)
