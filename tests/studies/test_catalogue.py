"""The studies as data: they cover what they claim to."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from kernelbank.atlas import SKELETONS
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import ROLES
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.study import WINDOW, Study, StudyRow, both, canonical, stages

SUBSETS = [frozenset(subset) for size in range(4) for subset in combinations(ROLES, size)]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_small_and_every_row_differs_from_the_baseline(name: str) -> None:
    study = STUDIES[name]()
    assert study.name == name and len(study.rows) <= 12 and study.skeletons == ("plain", "hierarchical")
    for skeleton in study.skeletons:
        texts = [canonical(skeleton, row.mixers[skeleton]) for row in study.rows]
        assert len(set(texts)) == len(texts)
        assert [canonical(skeleton, text) for text in texts] == texts


def test_the_softmax_study_is_a_full_factorial_over_the_roles() -> None:
    for skeleton in ("plain", "hierarchical"):
        specs = [spec for row in STUDIES["softmax"]().rows for spec in stages(skeleton, row.mixers[skeleton])]
        assert {frozenset(spec.roles) for spec in specs} == set(SUBSETS)
        assert {spec.position for spec in specs} == {"relative"}
        baseline = MixerSpec.parse("vit_relpos" if skeleton == "plain" else "swin support=window(2, alternate)")
        assert all(set(baseline.diff(spec)) <= {"activation"} for spec in specs)


def test_the_position_row_is_the_positional_term_of_depthwise_attention() -> None:
    """o_i = q_i * mean(k) + sum_j p_ij k_j: with q = 0 what is left is a static convolution, tied inside a head."""
    study, heads = STUDIES["depthwise"](), SKELETONS["hierarchical"].num_heads
    x, size = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 4
    for stage, h in enumerate(heads):
        x, size = (x, 4) if stage == 0 else (x[:, :4], 2)
        whole = Mixer(stages("hierarchical", study.row("dwsa").mixers["hierarchical"])[stage], 8, h, (size, size))
        static = Mixer(stages("hierarchical", study.row("position").mixers["hierarchical"])[stage], 8, h, (size, size))
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
    with pytest.raises(ValueError, match="hold the baseline"):
        Study(name="x", title="", questions=(), baseline="b", rows=rows[:1], quick=())
