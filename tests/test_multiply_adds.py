"""Multiply-adds have one meaning in training, studies and benchmarks: the closed form of the model, all products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernelbank.analysis.cost import cost, model_cost
from kernelbank.analysis.count import multiply_adds
from kernelbank.benchmark.subjects import Runner, Site, read
from kernelbank.data.dataset import Dataset, TensorSplit
from kernelbank.model import ModelSpec
from kernelbank.nn.build import build
from kernelbank.records import RunRecord
from kernelbank.spec import MixerSpec
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.model import describe
from kernelbank.train.recipe import Recipe
from kernelbank.train.session import begin_record
from kernelbank.zoo import find

SWIN = {"embed_dim": 16, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 4, 8]}
VIT = {"embed_dim": 64, "depth": 3, "num_heads": 2}
RECIPE = Recipe(epochs=2, batch_size=4, lr=1e-3, lr_batch=4, weight_decay=0.05, warmup_epochs=1)


def noise() -> Dataset:
    split = TensorSplit(torch.randn(8, 3, 64, 64), torch.arange(8) % 4)
    return Dataset("noise", "none", split, split, split, num_classes=1000, in_chans=3, img_size=(64, 64))


def recorded(spec: ModelSpec) -> RunRecord:
    return begin_record(
        study="train", row="run", model=build(spec), spec=spec, recipe=RECIPE, data=noise(), seed=0,
        engine=Engine(Hardware(device="cpu")),
    )  # fmt: skip


@pytest.mark.parametrize("mixer", [None, "activation=relu,count", "activation=identity,count"])
@pytest.mark.parametrize(("stock", "arguments", "ours"), [
    ("swin_tiny_patch4_window7_224", SWIN, "swin_kb_test_patch4_window7_64"),
    ("vit_tiny_patch16_224", VIT, "vit_kb_test_patch16_64"),
])  # fmt: skip
def test_the_record_of_a_training_run_is_the_closed_form(
    stock: str, arguments: dict[str, object], ours: str, mixer: str | None
) -> None:
    """Softmax costs as many multiply-adds as its replacements, in timm's models as in ours."""
    expected = model_cost(find(ours)).macs
    assert recorded(describe(stock, mixer=mixer, img_size=(64, 64), arguments=arguments)).macs == expected
    assert recorded(describe(ours, mixer=mixer)).macs == expected


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_kb_tiny_patch4_window7_224"])
@pytest.mark.parametrize("suffix", ["", " : swin activation=relu,count"])
def test_a_benchmark_states_the_closed_form(name: str, suffix: str) -> None:
    expected = model_cost(find("swin_kb_tiny_patch4_window7_224").at_size((56, 56))).macs
    assert Runner(read(name + suffix), Site(1, 56)).macs == expected


def test_a_benchmark_of_a_mixer_states_the_closed_form_on_every_path() -> None:
    expected = cost(MixerSpec.parse("dwsa"), 8, 2, (6, 6)).macs
    for text in ("dwsa", "dwsa @hybrid", "dwsa @vectorised,dense"):
        runner = Runner(read(text), Site(1, 6, 8, 2))
        assert runner.macs == expected
    assert Runner(read("dwsa @hybrid"), Site(1, 6, 8, 2)).path_macs() != expected


def test_another_model_is_counted() -> None:
    spec = describe("test_resnet", num_classes=5)
    model, images = build(spec).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert 2 * multiply_adds(model, spec, (64, 64)) == counter.get_total_flops() > 1e5
