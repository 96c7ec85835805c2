"""Images in files: what is random about one follows from its seed alone, splits by name, readers of timm."""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kernelbank.data.augment import Augmentation
from kernelbank.data.images import FileSplit, Loading, held_out, seeded
from kernelbank.data.load import open_data
from kernelbank.data.order import Part, Share, in_order
from kernelbank.errors import InputError

AUGMENT = Augmentation(scale=(0.3, 1.0), ratio=(0.75, 1.33), flip=0.5, auto_augment="rand-m9-mstd0.5-inc1", erase=0.5)
CIFAR = Path(os.environ.get("KERNELBANK_CIFAR10", "cifar10.tar.xz"))


def pictures(folder: Path, count: int = 12) -> Path:
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 255, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index}.png")
    return folder


def loaded(folder: Path, workers: int, shares: list[Share], augment: Augmentation | None) -> torch.Tensor:
    data = open_data(str(folder), Loading(size=(3, 16, 16), workers=workers), cache=folder)
    return torch.cat([images for images, _ in data.train.batches(shares, augment)])


def test_an_image_follows_from_its_seed_whatever_the_workers_and_the_batches(tmp_path: Path) -> None:
    folder, seeds = pictures(tmp_path), np.arange(24) * 7
    one = [Share(np.arange(24), seeds, 24)]
    many = [Share(np.arange(24)[i : i + 5], seeds[i : i + 5], 5) for i in range(0, 24, 5)]
    random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = loaded(folder, 0, one, AUGMENT)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])  # drop path must not hang on augmentation
    assert torch.equal(first, loaded(folder, 0, many, AUGMENT))
    assert torch.equal(first, loaded(folder, 2, many, AUGMENT))
    other = loaded(folder, 0, [Share(np.arange(24), seeds + 1, 24)], AUGMENT)
    assert not torch.equal(first, other)
    plain = loaded(folder, 0, one, None)
    assert plain.shape == (24, 3, 16, 16) and not torch.equal(first, plain)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm's reader keeps its tar open
def test_a_tar_in_the_place_of_a_folder_is_the_same(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "folder")
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    for workers in (0, 1):
        sets = [open_data(str(root), Loading(size=(3, 16, 16), workers=workers), cache=tmp_path)
                for root in (folder, tmp_path / "tars")]  # fmt: skip
        shares = list(in_order(24, 24, Part()))
        batches = [next(iter(data.val.batches(shares, None))) for data in sets]
        assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])


def test_validation_is_held_out_by_name_in_every_class() -> None:
    names = [f"{kind}/{index:03}.jpg" for kind in "ab" for index in range(100)]
    labels = [0] * 100 + [1] * 100
    chosen = held_out(names, labels, 0.1)
    assert chosen[:100].sum() == chosen[100:].sum() == 10
    order = np.random.default_rng(0).permutation(200)
    again = held_out([names[i] for i in order], [labels[i] for i in order], 0.1)
    assert {names[i] for i in np.flatnonzero(chosen)} == {names[order[i]] for i in np.flatnonzero(again)}
    assert held_out(["x"], [0], 0.1).tolist() == [True]  # every class has one


def test_torchvision_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.targets = [0, 1] * (20 if train else 3)
            self.classes = ["zero", "one"]

        def __getitem__(self, index: int) -> Any:
            return Image.new("RGB", (28, 28)), self.targets[index]

    import timm.data.dataset_factory as factory

    monkeypatch.setitem(factory._TORCH_BASIC_DS, "cifar10", Fake)
    data = open_data("torch/cifar10", Loading(size=(3, 16, 16), workers=0), cache=tmp_path)
    assert (len(data.train), len(data.val), len(data.test or ()), data.num_classes) == (36, 4, 6, 2)
    monkeypatch.undo()
    assert torchvision.__version__
    with pytest.raises(InputError, match=r"torch/cifar10 cannot be opened: .* add --download"):
        open_data("torch/cifar10", Loading(), cache=tmp_path)
    with pytest.raises(InputError, match="torch/nothing cannot be opened"):
        open_data("torch/nothing", Loading(), cache=tmp_path)


def test_seeded_draws_the_same_and_leaves_the_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw(), draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    first = draw()
    with seeded(9):
        inside = draw()
    with seeded(9):
        assert draw() == inside
    assert (first, draw()) == (expected[0], draw_after(expected))


def draw_after(expected: tuple[Any, Any]) -> Any:
    return expected[1]


@pytest.mark.skipif(not CIFAR.exists(), reason="no cifar10.tar.xz: say where it is in KERNELBANK_CIFAR10")
def test_cifar10_is_split_and_pinned(tmp_path: Path) -> None:
    data = open_data(str(CIFAR), Loading(size=(3, 32, 32), workers=0), cache=tmp_path)
    assert (len(data.train), len(data.val), len(data.test or ()), data.num_classes) == (45000, 5000, 10000, 10)
    assert data.sha256 == hashlib.sha256(CIFAR.read_bytes()).hexdigest()
    assert isinstance(data.val, FileSplit) and isinstance(data.train, FileSplit)
    labels = np.array(data.train.source.labels)
    assert (np.bincount(labels[data.val.rows]) == 500).all()
    assert not set(data.val.rows) & set(data.train.rows)


@pytest.mark.skipif(not CIFAR.exists(), reason="no cifar10.tar.xz: say where it is in KERNELBANK_CIFAR10")
def test_cifar10_by_its_name(tmp_path: Path) -> None:
    loading = Loading(size=(3, 32, 32), workers=0)
    data = open_data(f"cifar10/{CIFAR.absolute()}", loading, cache=tmp_path / "cache")
    assert data.identity == replace(open_data(str(CIFAR), loading, cache=tmp_path / "cache").identity, name="cifar10")
    (tmp_path / "cache" / "cifar10.tar.xz").symlink_to(CIFAR.absolute())
    assert open_data("cifar10", loading, cache=tmp_path / "cache").sha256 == data.sha256


def test_what_is_not_cifar10_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loading = pictures(tmp_path / "pictures"), Loading(size=(3, 16, 16), workers=0)
    with pytest.raises(InputError, match=r"pictures is not CIFAR-10: it has 24 training, 24 validation, 0 test images"):
        open_data(f"cifar10/{folder}", loading, cache=tmp_path)
    with pytest.raises(InputError, match=r"cifar10: there is no .*cifar10\.tar\.xz; expected"):
        open_data("cifar10", loading, cache=tmp_path)
    monkeypatch.chdir(tmp_path)
    folder.rename("cifar10")  # a folder of this name is a path, as every other
    assert len(open_data("cifar10", loading, cache=tmp_path).train) == 24
    monkeypatch.setattr("kernelbank.data.cifar10.COUNTS", {"training": 24, "validation": 24, "test": 0})
    monkeypatch.setattr("kernelbank.data.cifar10.CLASSES", 2)
    with pytest.raises(InputError, match=r"its first image is \(24, 20\); expected \(32, 32\)"):
        open_data(f"cifar10/{tmp_path / 'cifar10'}", loading, cache=tmp_path)
