"""Images that live on the device: the crops of timm, evaluation as from files, and one draw for each seed."""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as vision

from kernelbank.data import resident
from kernelbank.data.augment import Augmentation
from kernelbank.data.by_batch import augmented, crops, erased, resampling
from kernelbank.data.dataset import UNREADABLE, Dataset
from kernelbank.data.draws import bits, normals, uniforms
from kernelbank.data.images import BrokenImagesError, Loading
from kernelbank.data.load import open_data
from kernelbank.data.order import Part, Share, in_order
from kernelbank.data.resident import ResidentSplit, on_device
from kernelbank.nn.build import build_backbone
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import Stopped, train
from kernelbank.train.recipe import Recipe
from kernelbank.zoo import SMALL

AUGMENT = Augmentation(scale=(0.3, 1.0), ratio=(0.75, 4 / 3), flip=0.5)
PLAIN = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
SEEDS = torch.from_numpy(np.random.default_rng(0).integers(2**62, size=4096))


def pixels(count: int, size: tuple[int, int] = (24, 20)) -> torch.Tensor:
    """Noise, enlarged twice so that neighbours are alike, as in images."""
    noise = np.random.default_rng(0).integers(0, 255, (count, 3, size[0] // 2, size[1] // 2), dtype=np.uint8)
    return torch.from_numpy(noise.repeat(2, 2).repeat(2, 3))


def folder(root: Path, size: tuple[int, int] = (24, 20), count: int = 12) -> Path:
    for split in ("train", "val"):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for index, image in enumerate(pixels(count, size)):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                picture.save(root / split / f"class{label}" / f"{index}.png")
    return root


def opened(root: Path, **changes: Any) -> Dataset:
    loading = Loading(size=(3, 16, 16), workers=0, crop_pct=0.875, **changes)
    return open_data(str(root), loading, cache=root)


def placed(root: Path, augment: Augmentation | None = AUGMENT, share: float = 0.1, **changes: Any) -> Dataset:
    return on_device(opened(root, **changes), augment, torch.device("cpu"), share, root / "cache", lambda *_: None)


# ---- draws -------------------------------------------------------------------------------------------------


def test_the_stream_of_a_seed_is_splitmix64() -> None:
    # the first outputs for seed 0 of https://prng.di.unimi.it/splitmix64.c
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in bits(torch.zeros(1, dtype=torch.int64), 3)[0].tolist()] == expected
    assert torch.equal(bits(SEEDS, 5)[:, 2:], bits(SEEDS, 3, start=2))


def test_draws_have_the_moments_that_they_should() -> None:
    u, z = uniforms(SEEDS, 16), normals(SEEDS, 16)
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == u.numel()
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.var().item() == pytest.approx(1 / 12, abs=0.01)
    assert z.mean().item() == pytest.approx(0, abs=0.02) and z.var().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 0.06


# ---- crops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (40, 28), (24, 20)])
def test_a_crop_is_resized_as_pillow_does(name: str, size: tuple[int, int]) -> None:
    """On grey levels that the filters do not push out of range, where Pillow cuts them off between its two passes."""
    images = pixels(64) // 3 + 85
    augment = replace(AUGMENT, interpolation=name, flip=0.0)  # type: ignore[arg-type]
    boxes = crops(SEEDS[:64], (24, 20), augment)
    found, apart = augmented(images, SEEDS[:64], augment, size, PLAIN) * 255, list[float]()
    for index, image in enumerate(images):
        top, left, height, width = (int(values[index]) for values in (boxes.top, boxes.left, boxes.height, boxes.width))
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        mode = vision.InterpolationMode(name)
        expected = np.asarray(vision.resized_crop(picture, top, left, height, width, list(size), mode), np.float32)
        distance = (found[index].permute(1, 2, 0) - torch.from_numpy(expected)).abs()
        apart.append((distance > 0.01).float().mean().item())
        assert distance.max() < 1.01
    assert sum(apart) / len(apart) < 0.25  # Pillow rounds between its passes


def test_crops_and_flips_are_distributed_as_timms() -> None:
    boxes = crops(SEEDS, (24, 20), AUGMENT)
    image = Image.new("RGB", (20, 24))
    random.seed(0)
    drawn = np.array([RandomResizedCropAndInterpolation.get_params(image, AUGMENT.scale, AUGMENT.ratio)
                      for _ in range(4096)])  # fmt: skip
    for column, ours in enumerate((boxes.top, boxes.left, boxes.height, boxes.width)):
        assert ours.double().mean().item() == pytest.approx(drawn[:, column].mean(), abs=0.15)
        assert ours.double().std().item() == pytest.approx(drawn[:, column].std(), abs=0.15)
    assert bool((boxes.top + boxes.height <= 24).all()) and bool((boxes.left + boxes.width <= 20).all())
    plain = Augmentation(flip=0.5, ratio=(20 / 24, 20 / 24))
    images = pixels(1).expand(4096, -1, -1, -1)
    flipped = (augmented(images, SEEDS, plain, (24, 20), PLAIN) * 255 - images.flip(-1)).abs().amax((1, 2, 3)) < 0.01
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_crop_that_never_fits_is_the_largest_in_the_centre() -> None:
    wide = Augmentation(scale=(1.0, 1.0), ratio=(2.0, 2.0))
    boxes = crops(SEEDS[:4], (24, 20), wide)
    assert boxes.height.tolist() == [10] * 4 and boxes.width.tolist() == [20] * 4 and boxes.top.tolist() == [7] * 4


def test_weights_of_resampling_sum_to_one_inside_the_crop() -> None:
    start, length = torch.tensor([0, 5, 11]), torch.tensor([24, 3, 12])
    for cubic in (True, False):
        weights = resampling(start, length, 24, 16, torch.tensor([cubic] * 3))
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 16))
        for row, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            outside = torch.cat([weights[row, :, :first], weights[row, :, first + count :]], 1)
            assert not outside.any()


# ---- erasing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_is_distributed_as_timms(mode: str) -> None:
    images = torch.full((4096, 3, 24, 20), 9.0)
    random.seed(0)
    ours = erased(images, SEEDS, Augmentation(erase=0.5, erase_mode=mode))  # type: ignore[arg-type]
    theirs = RandomErasing(0.5, mode=mode, device="cpu")(images.clone())
    for found in (ours, theirs):
        assert ((found != 9).sum((1, 2, 3)) > 0).float().mean() > 0.45
    areas = [(found[:, 0] != 9).double().mean((1, 2)) for found in (ours, theirs)]
    assert (areas[0] > 0).double().mean().item() == pytest.approx((areas[1] > 0).double().mean().item(), abs=0.03)
    assert areas[0].mean().item() == pytest.approx(areas[1].mean().item(), abs=0.01)
    inside = [found[found != 9] for found in (ours, theirs)]
    assert inside[0].mean().item() == pytest.approx(inside[1].mean().item(), abs=0.06)
    assert inside[0].std().item() == pytest.approx(inside[1].std().item(), abs=0.06)


# ---- the split ---------------------------------------------------------------------------------------------


def test_evaluation_sees_what_files_give(tmp_path: Path) -> None:
    data, there = opened(folder(tmp_path)), placed(tmp_path)
    assert there.images == "device" and data.images == "files" and there.identity == data.identity
    shares = list(in_order(24, 7, Part()))
    for (images, labels), (ours, own) in zip(
        data.val.batches(shares, None), there.val.batches(shares, None), strict=True
    ):
        assert torch.equal(images, ours) and torch.equal(labels, own)


def test_an_image_follows_from_its_seed_whatever_the_batches(tmp_path: Path) -> None:
    train = placed(folder(tmp_path)).train
    assert isinstance(train, ResidentSplit)
    seeds = SEEDS[:24].numpy()
    augment = replace(AUGMENT, erase=0.5, interpolation="random", shift=2)
    one = next(train.batches([Share(np.arange(24), seeds, 24)], augment))
    many = [Share(np.arange(24)[at : at + 5], seeds[at : at + 5], 5) for at in range(0, 24, 5)]
    assert torch.equal(one[0], torch.cat([images for images, _ in train.batches(many, augment)]))
    turned = next(train.batches([Share(np.arange(24)[::-1].copy(), seeds[::-1].copy(), 24)], augment))
    assert torch.equal(one[0], turned[0].flip(0)) and torch.equal(one[1], turned[1].flip(0))
    other = next(train.batches([Share(np.arange(24), seeds + 1, 24)], augment))
    assert not torch.equal(one[0], other[0])


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, told = placed(folder(tmp_path)), list[tuple[int, int]]()
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(kept) == 4  # two splits, an array and a marker each
    monkeypatch.setattr("kernelbank.data.decoded._decode", None)
    again = placed(tmp_path)
    share = [Share(np.arange(24), SEEDS[:24].numpy(), 24)]
    assert torch.equal(next(again.train.batches(share, AUGMENT))[0], next(first.train.batches(share, AUGMENT))[0])
    monkeypatch.undo()
    next((tmp_path / "cache").glob("*.npy")).write_bytes(b"cut")
    (tmp_path / "train" / "class0" / "0.png").touch()  # another time: decoded anew, and the cut file is not believed
    on_device(opened(tmp_path), AUGMENT, torch.device("cpu"), 0.1, tmp_path / "cache", lambda *at: told.append(at))
    assert told[-1] == (24, 24)


@pytest.mark.parametrize(
    ("augment", "share", "said"),
    [
        (replace(AUGMENT, auto_augment="rand-m9"), 0.1, "read from files, since auto_augment=rand-m9 is for single"),
        (replace(AUGMENT, color_jitter=0.3), 0.1, "read from files, since color_jitter=0.3 is for single images"),
        (AUGMENT, 1e-9, "read from files, since decoded they take 5.3e-05 GB, more than 1e-09 of the memory of cpu"),
    ],
)
def test_what_does_not_qualify_stays_in_files_and_says_why(
    augment: Augmentation, share: float, said: str, tmp_path: Path
) -> None:
    data = placed(folder(tmp_path), augment, share)
    assert data.images == "files" and len(data.notes) == 1 and said in data.notes[0]
    assert not (tmp_path / "cache").exists()


def test_images_of_several_sizes_stay_in_files(tmp_path: Path) -> None:
    Image.new("RGB", (20, 25)).save(folder(tmp_path) / "train" / "class1" / "11.png")
    data = placed(tmp_path)
    assert data.images == "files" and "they differ in size: class1/11.png is 25 x 20, not 24 x 20" in data.notes[0]
    assert placed(tmp_path, share=0).notes == placed(tmp_path, augment=None).notes == ()


def test_broken_images_are_replaced_in_training_and_left_out_of_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path)
    (tmp_path / "train" / "class0" / "3.png").write_bytes(b"no image")
    (tmp_path / "val" / "class1" / "0.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING), pytest.raises(BrokenImagesError, match="1 of 24 images cannot be read"):
        placed(tmp_path)
    there, files = placed(tmp_path, max_broken=0.1), opened(tmp_path, max_broken=0.1)
    whole = [Share(np.arange(24), np.zeros(24, np.int64), 24)]
    plain = Augmentation()
    for split in ("train", "val"):
        for augment in (plain, None) if split == "train" else (None,):
            ours = next(getattr(there, split).batches(whole, augment))
            theirs = next(iter(getattr(files, split).batches(whole, augment)))
            assert torch.equal(ours[1], theirs[1])
    assert there.train.broken == files.train.broken and len(there.val.broken) == 1
    assert (next(there.val.batches(whole, None))[1] == UNREADABLE).sum() == 1


def test_the_memory_of_the_processor_is_all_of_it() -> None:
    assert resident.memory(torch.device("cpu")) > 2**28


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    data = placed(folder(tmp_path), replace(AUGMENT, erase=0.3))
    recipe = Recipe(epochs=2, batch_size=8, lr=4e-3, lr_batch=8, weight_decay=0.05, mixup=0.4, drop_path=0.1,
                    **asdict(replace(AUGMENT, erase=0.3)))  # fmt: skip
    spec = replace(SMALL["plain"], img_size=(16, 16), in_chans=3, num_classes=2)

    def trained(checkpoint: Path, stop_after: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, asked = build_backbone(spec), iter(range(10**6))
        try:
            train(model, data, recipe, seed=3, engine=Engine(Hardware(device="cpu")), checkpoint=checkpoint,
                  stop=lambda: next(asked) >= stop_after)  # fmt: skip
        except Stopped:
            return trained(checkpoint, 10**6)
        return model.state_dict()

    whole, stopped = trained(tmp_path / "a.safetensors", 10**6), trained(tmp_path / "b.safetensors", 1)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
