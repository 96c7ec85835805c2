"""The training loop: bit-exact across interruptions, clear about everything that stops it."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernelbank.data.dataset import Dataset, TensorSplit, shifted
from kernelbank.data.order import derive
from kernelbank.errors import InputError
from kernelbank.records import EpochResult
from kernelbank.train.loop import DivergedError, History, evaluate, train
from kernelbank.train.optimiser import build_optimiser, build_scheduler
from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import digits_recipe

RECIPE = Recipe(epochs=4, batch_size=16, lr=1e-2, lr_batch=16, weight_decay=0.05, warmup_epochs=1, warmup_lr=1e-4,
                label_smoothing=0.1, clip_grad=1.0, shift=1, drop_last=False)  # fmt: skip


def tiny_data(train: int = 50) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        return TensorSplit(torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 3)

    return Dataset("tiny", "none", split(train), split(9), split(9), num_classes=3, in_chans=1, img_size=(4, 4))


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def numbers(history: History) -> list[tuple[float, float, float]]:
    return [(e.train_loss, e.val_loss, e.val_top1) for e in history.epochs]


def stop_after(epochs: int) -> Callable[[EpochResult, bool], None]:
    seen: list[EpochResult] = []

    def stop(result: EpochResult, _: bool) -> None:
        seen.append(result)
        if len(seen) == epochs:
            raise KeyboardInterrupt

    return stop


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("stops", [[1], [3], [4], [1, 2, 3]])
def test_a_resumed_run_is_bit_exact(tmp_path: Path, stops: list[int]) -> None:
    data, whole, path = tiny_data(), model(), tmp_path / "run.safetensors"
    uninterrupted = train(whole, data, RECIPE, seed=3)
    for stop in stops:
        torch.manual_seed(stop)  # the state outside must not matter
        with pytest.raises(KeyboardInterrupt):
            train(model(), data, RECIPE, seed=3, checkpoint=path, on_epoch=stop_after(stop))
    resumed, told = model(), list[tuple[EpochResult, bool]]()
    history = train(resumed, data, RECIPE, seed=3, checkpoint=path, on_epoch=lambda *event: told.append(event))
    assert numbers(history) == numbers(uninterrupted) and tuple(epoch for epoch, _ in told) == history.epochs
    assert [read for _, read in told] == [epoch < stops[-1] for epoch in range(4)]
    assert_same(resumed, whole)


def test_the_random_state_outside_is_left_alone_and_the_seed_matters() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train(model(), tiny_data(), RECIPE, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert numbers(first) == numbers(train(model(), tiny_data(), RECIPE, seed=0))
    assert numbers(first) != numbers(train(model(), tiny_data(), RECIPE, seed=1))
    assert len({derive(seed, epoch, what) for seed in range(9) for epoch in range(9) for what in "ab"}) == 162


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_a_broken_checkpoint_is_set_aside_and_the_run_restarts(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    data, whole, path = tiny_data(), model(), tmp_path / "run.safetensors"
    uninterrupted = train(whole, data, RECIPE, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(model(), data, RECIPE, seed=3, checkpoint=path, on_epoch=stop_after(2))
    path.write_bytes(path.read_bytes()[:keep])
    resumed = model()
    history = train(resumed, data, RECIPE, seed=3, checkpoint=path)
    assert numbers(history) == numbers(uninterrupted)
    assert_same(resumed, whole)
    assert (tmp_path / "run.safetensors.broken").exists() and "run.safetensors is not a checkpoint" in caplog.text


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(model(), tiny_data(), RECIPE, seed=3, checkpoint=path)
    with pytest.raises(InputError, match=r"run\.safetensors belongs to another run: its seed is 3; expected 4"):
        train(model(), tiny_data(), RECIPE, seed=4, checkpoint=path)
    with pytest.raises(InputError, match=r"its recipe\.lr is 0\.01; expected 0\.5"):
        train(model(), tiny_data(), replace(RECIPE, lr=0.5), seed=3, checkpoint=path)


def test_a_checkpoint_on_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*run\.safetensors"):
        train(model(), tiny_data(), RECIPE, seed=3, checkpoint=tmp_path / "run.safetensors")


def test_a_loss_that_is_not_finite_names_its_place() -> None:
    data = tiny_data()
    assert isinstance(data.train, TensorSplit) and isinstance(data.val, TensorSplit)
    data.train.images[data.train.labels == 1] = math.inf
    with pytest.raises(DivergedError, match=r"training loss nan at epoch 1, step 1, lr 0\.0001"):
        train(model(), data, RECIPE, seed=0)
    data = tiny_data()
    assert isinstance(data.val, TensorSplit)
    data.val.images.fill_(math.nan)
    with pytest.raises(DivergedError, match="validation loss nan after epoch 1"):
        train(model(), data, RECIPE, seed=0)


def test_a_single_image_and_a_single_epoch() -> None:
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert len(train(net, tiny_data(1), recipe, seed=0).epochs) == 1


def test_evaluate_counts_and_restores_the_mode() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)

    fixed = Fixed()
    split = TensorSplit(torch.zeros(5, 1, 2, 2), torch.tensor([0, 0, 0, 1, 1]))
    metrics = evaluate(fixed, split, batch_size=2)
    assert fixed.training and (metrics.top1, metrics.top5, metrics.count) == (60.0, 100.0, 5)
    expected = (3 * math.log(1 + math.exp(-1)) + 2 * math.log(1 + math.e)) / 5
    assert metrics.loss == pytest.approx(expected, rel=1e-6)


def test_what_has_no_weight_decay() -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 3, 3))

        def no_weight_decay(self) -> set[str]:
            return {"table"}

    net = Tabled()
    optimiser = build_optimiser(net, RECIPE)
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in (net.linear.weight, net.linear.bias, net.table)] == [0.05, 0.0, 0.0]


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    optimiser = build_optimiser(model(), RECIPE)
    scheduler, rates = build_scheduler(optimiser, RECIPE, steps=10), []
    for step in range(40):
        scheduler.step(RECIPE.schedule_at(step // 10, step % 10, 10))
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates[0] == RECIPE.lr / 100 and max(rates) == rates[10] == RECIPE.lr and 0 < rates[-1] < RECIPE.lr / 100
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_shifted_moves_every_image_by_its_own_offset() -> None:
    images, seeds = torch.arange(18 * 16.0).view(18, 1, 4, 4), torch.arange(18)
    moved = shifted(images, 1, seeds)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    for image, source, seed in zip(moved, padded, seeds.tolist(), strict=True):
        y, x = seed % 3, seed // 3 % 3
        assert torch.equal(image, source[:, y : y + 4, x : x + 4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", True), ("batch_size", 0), ("lr", 0.0), ("lr", math.nan), ("weight_decay", -1.0),
        ("warmup_epochs", 4), ("warmup_epochs", -1), ("label_smoothing", 1.0), ("drop_path", -0.1), ("clip_grad", 0.0),
        ("shift", -1), ("optimiser", "adam"), ("scale", (0.5, 0.2)), ("betas", (0.9, 1.0)), ("ema", 1.0),
        ("lr_rule", "square"), ("repeats", 0), ("layer_decay", 0), ("erase", 1.5),
    ],
)  # fmt: skip
def test_a_recipe_names_what_is_not_legal(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"recipe: invalid {re.escape(f'{field}={value!r}')}; expected "):
        replace(RECIPE, **{field: value})  # type: ignore[arg-type]


def test_the_digits_recipe_takes_any_epochs() -> None:
    assert [digits_recipe(n).warmup_epochs for n in (1, 2, 3, 12)] == [0, 1, 2, 2]
