"""Post-scales: at the start the outputs of a row's mixers are as large as softmax's, and the record states how."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelbank.cli import main
from kernelbank.data.load import load
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.records import RunRecord
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.hosts import host_stages
from kernelbank.studies.post_scale import first_images, output_rms, with_post_scales
from kernelbank.studies.study import StudyRow, changed, named_host
from kernelbank.train.model import describe

STUDY = STUDIES["softmax"]()
SCALED = [row for row in STUDY.rows if row.scaled]
HOSTS = DESIGNS["digits"].hosts
STOCK = describe(
    "vit_tiny_patch16_224", img_size=(8, 8), in_chans=1, num_classes=10,
    arguments={"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 2},
)  # fmt: skip


def scaled(host: ModelSpec, rows: list[StudyRow]) -> dict[str, ModelSpec]:
    return dict(with_post_scales(host, host_stages(host, ""), rows, STUDY.row("softmax"), load("digits")))


@pytest.mark.parametrize("host", [*(named_host(*pair) for pair in HOSTS.items()), STOCK], ids=[*HOSTS, "stock"])
def test_outputs_are_as_large_as_those_of_softmax(host: ModelSpec) -> None:
    stages, images = host_stages(host, ""), first_images(load("digits"))
    target = output_rms(changed(host, STUDY.row("softmax"), stages), images)
    models = scaled(host, SCALED)
    assert set(models) == {row.label for row in SCALED} and len(models) == 11
    for label, model in models.items():
        assert output_rms(model, images) == pytest.approx(target, rel=0.02), label
        before = output_rms(changed(host, STUDY.row(label), stages), images)
        assert before == output_rms(changed(host, STUDY.row(label.removesuffix("-scaled")), stages), images)
    # softmax gives a mean of the values, ReLU a part of it: the scale that the row without a factor lacks
    before = output_rms(changed(host, STUDY.row("relu"), stages), images)
    assert all(own < 0.5 * aim for own, aim in zip(before, target, strict=True))


def test_the_factor_is_a_cell_of_the_spec_by_stage_and_the_same_every_time() -> None:
    host = named_host("hierarchical", HOSTS["hierarchical"])
    row = STUDY.row("relu-scaled")
    models = [scaled(host, [row])["relu-scaled"] for _ in range(2)]
    assert models[0] == models[1]
    steps = [stage.mixer.activation for stage in models[0].stages]
    assert all([step.name for step in own] == ["relu", "count", "scale"] for own in steps)
    assert steps[0][-1].argument != steps[1][-1].argument


def test_the_run_record_states_the_factor(tmp_path: Path) -> None:
    words = ["study", "softmax", "--models", "plain", "--rows", "relu-scaled", "--seeds", "0", "--epochs", "1"]
    assert main([*words, "--jobs", "1", "--out", str(tmp_path)]) == 0
    (path,) = (tmp_path / "records").iterdir()
    host = named_host("plain")
    expected = scaled(host, [STUDY.row("relu-scaled")])["relu-scaled"]
    assert RunRecord.load(path).mixer == expected.mixer and "activation=relu,count,scale(" in str(expected.mixer)


def test_outputs_of_zero_cannot_be_scaled() -> None:
    row = StudyRow("zero", "", "position=none activation=relu,scale(1e-200),relu,count,scale(1e-200),scale({scale})")
    with pytest.raises(InputError, match=r"plain cannot hold row zero: .* expected finite numbers > 0"):
        scaled(named_host("plain"), [row])
