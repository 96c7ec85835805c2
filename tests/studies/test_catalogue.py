"""The studies as data: they cover what they claim to."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import ROLES
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.study import WINDOW, Study, StudyRow, both
from kernelbank.zoo import SMALL

SUBSETS = [frozenset(subset) for size in range(4) for subset in combinations(ROLES, size)]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_small_and_every_row_differs_from_the_baseline(name: str) -> None:
    study = STUDIES[name]()
    assert study.name == name and len(study.rows) <= 12 and study.models == ("plain", "hierarchical")
    for model in study.models:
        texts = [study.model(model, row).mixer for row in study.rows]
        assert len(set(texts)) == len(texts)
        assert [study.model(model, row).canonical().mixer for row in study.rows] == texts


def test_the_softmax_study_is_a_full_factorial_over_the_roles() -> None:
    study = STUDIES["softmax"]()
    for model in ("plain", "hierarchical"):
        specs = [stage.mixer for row in study.rows for stage in study.model(model, row).stages]
        assert {frozenset(spec.roles) for spec in specs} == set(SUBSETS)
        assert {spec.position for spec in specs} == {"relative"}
        baseline = MixerSpec.parse("vit_relpos" if model == "plain" else "swin support=window(2, alternate)")
        assert all(set(baseline.diff(spec)) <= {"activation"} for spec in specs)


def test_the_position_row_is_the_positional_term_of_depthwise_attention() -> None:
    """o_i = q_i * mean(k) + sum_j p_ij k_j: with q = 0 what is left is a static convolution, tied inside a head."""
    study, heads = STUDIES["depthwise"](), SMALL["hierarchical"].trunk.heads
    x, size = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 4
    for stage, h in enumerate(heads):
        x, size = (x, 4) if stage == 0 else (x[:, :4], 2)
        specs = (study.model("hierarchical", study.row(row)).stages[stage].mixer for row in ("dwsa", "position"))
        whole, static = (Mixer(spec, 8, h, (size, size)) for spec in specs)
        whole, static = whole.double(), static.double()
        a, b = whole.tensors(), static.tensors()
        with torch.no_grad():
            for name in ("q.weight", "q.bias"):
                b[name].copy_(a[name.replace("q", "key")])
                a[name].zero_()
            b["weight"].copy_(a["table.weight"].flip(1, 2).reshape(b["weight"].shape))
            b["bias"].zero_()
            for name in ("out.weight", "out.bias"):
                b[name].copy_(a[name])
        torch.testing.assert_close(static(x), whole(x), atol=1e-12, rtol=1e-12)


def test_the_studies_share_their_windows() -> None:
    texts = [row.mixers["hierarchical"] for study in STUDIES.values() for row in study().rows]
    assert {WINDOW in text for text in texts if text.startswith("swin")} == {True}


def test_labels_are_checked() -> None:
    rows = (StudyRow("a", "", both("vit", "vit")),) * 2
    with pytest.raises(ValueError, match="labels must be unique"):
        Study(name="x", title="", questions=(), baseline="a", rows=rows, quick=())
    with pytest.raises(ValueError, match="include the baseline"):
        Study(name="x", title="", questions=(), baseline="b", rows=rows[:1], quick=())
