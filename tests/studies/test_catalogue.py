"""The studies as data: they cover what they claim to."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

from kernelbank.analysis.cost import model_cost
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.nn.mixer import Mixer
from kernelbank.records import RunRecord
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import ROLES
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.hosts import with_rows
from kernelbank.studies.measures import BASELINE
from kernelbank.studies.run import on_meta_device
from kernelbank.studies.study import Study, StudyRow, changed, named_host
from kernelbank.train.model import describe
from kernelbank.train.recipes import published
from kernelbank.zoo import SMALL

SUBSETS = [frozenset(subset) for size in range(4) for subset in combinations(ROLES, size)]
RECORDS = Path(__file__).parents[2] / "records"
HOSTS = DESIGNS["digits"].hosts


def in_host(study: Study, label: str, model: str) -> ModelSpec:
    return changed(named_host(model, HOSTS.get(model, "")), study.row(label))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("model", [*HOSTS, "plain32", "hierarchical32", "vit_kb_small_patch16_224"])
def test_every_row_differs_from_the_others_in_every_host(name: str, model: str) -> None:
    study = STUDIES[name]()
    models = {label: in_host(study, label, model) for label in study.labels}
    texts = {label: (found.mixer, found.mlp, study.row(label).fine_tuning) for label, found in models.items()}
    # in windows of the whole grid, or without any, some rows coincide; nowhere do others
    same = {"dwsa": "dwsa-window", "gate": "gate-window"} if model == "hierarchical32" else {}
    kept = {label: text for label, text in texts.items() if label not in same.values()}
    assert study.name == name and study.baseline == BASELINE and len(set(kept.values())) == len(kept)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_names_rows_hosts_and_a_recipe_that_exist(name: str) -> None:
    design = DESIGNS[name]
    assert set(design.rows) <= set(STUDIES) and len(set(design.seeds)) == len(design.seeds)
    published(design.recipe)
    for study in (make() for make in STUDIES.values()):
        labels = design.rows.get(study.name, study.labels)
        assert study.baseline in labels and set(labels) <= set(study.labels)
        for model, cells in design.hosts.items():
            for label in labels:
                changed(named_host(model, cells), study.row(label))


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDS.iterdir() if path.name in STUDIES))
def test_the_digits_are_what_the_committed_records_hold(name: str) -> None:
    study, design, found = STUDIES[name](), DESIGNS["digits"], set()
    for path in (RECORDS / name / "records").glob("*.json"):
        record = RunRecord.load(path)
        assert in_host(study, record.row, record.model.name).stages == record.model.stages
        found.add((record.row, record.model.name, record.seed))
    labels = design.rows.get(name, study.labels)
    assert found == {(row, model, seed) for row in labels for model in design.hosts for seed in design.seeds}


def test_the_softmax_study_is_a_full_factorial_over_the_roles() -> None:
    study = STUDIES["softmax"]()
    for model in HOSTS:
        rows = [in_host(study, label, model) for label in DESIGNS["digits"].rows["softmax"]]
        specs = [stage.mixer for row in rows for stage in row.stages]
        assert {frozenset(spec.roles) for spec in specs} == set(SUBSETS)
        assert {spec.text["position"] for spec in specs} == {"relative"}
        baseline = MixerSpec.parse("vit_relpos" if model == "plain" else "swin support=window(2, alternate)")
        assert all(set(baseline.diff(spec)) <= {"activation"} for spec in specs)


def test_the_position_row_is_the_positional_term_of_depthwise_attention() -> None:
    """o_i = q_i * mean(k) + sum_j p_ij k_j: with q = 0 what is left is a static convolution, tied inside a head."""
    study, heads = STUDIES["depthwise"](), SMALL["hierarchical"].trunk.heads
    x, size = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 4
    for stage, h in enumerate(heads):
        x, size = (x, 4) if stage == 0 else (x[:, :4], 2)
        specs = (in_host(study, row, "hierarchical").stages[stage].mixer for row in ("dwsa", "position"))
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


def test_kinds_of_normalisation_communication_and_non_linearity_are_crossed() -> None:
    """The factorial of the design on natural images: which cells have a row."""
    study, cells = STUDIES["softmax"](), {}
    for label in study.labels:
        if label.endswith(("-raw", "-absolute", "-scaled")):
            continue
        spec = in_host(study, label, "plain32").stages[0].mixer
        steps = {step.name for step in spec.activation}
        kind = "batchnorm" if "batchnorm" in steps else "rmsnorm" if steps & {"rmsnorm", "layernorm"} else "none"
        wave = "exp" if "exp" in steps else "relu" if "relu" in steps else "identity"
        if not steps & {"l1", "sigmoid"}:
            cells.setdefault((kind, "communication" in spec.roles, wave), label)
    missing = {(k, c, w) for k in ("none", "batchnorm", "rmsnorm") for c in (False, True)
               for w in ("identity", "relu", "exp")} - set(cells)  # fmt: skip
    assert len(cells) == 14 and missing == {
        ("batchnorm", True, "relu"), ("batchnorm", True, "exp"), ("rmsnorm", False, "relu"), ("rmsnorm", False, "exp"),
    }  # fmt: skip


def test_depthwise_kernels_differ_in_their_source_alone() -> None:
    """The rows of study kernels that are compared with each other share frame, kernel type and size."""
    study, labels = STUDIES["kernels"](), ("static", "image", "position", "prototypes")
    for model in [*HOSTS, "plain32", "hierarchical32"]:
        specs = {label: [stage.mixer for stage in in_host(study, label, model).stages] for label in labels}
        for label in labels:
            for spec, static in zip(specs[label], specs["static"], strict=True):
                assert set(spec.diff(static)) <= {"bank", "support", "mix"} and spec.size == 7
        banks = [stage.mixer for stage in in_host(study, "bank", model).stages]
        assert all((spec.frame, str(spec.kernel)) == ("linear", "depthwise") for spec in banks)


@pytest.mark.parametrize("model", [*HOSTS, "plain32", "hierarchical32", "vit_kb_small_patch16_224"])
def test_mlps_are_replaced_at_equal_multiply_adds(model: str) -> None:
    study = STUDIES["future"]()
    models = {label: in_host(study, label, model) for label in ("softmax", "no-mlp", "two-mixers", "memory")}
    macs = {label: model_cost(spec).macs for label, spec in models.items()}
    assert macs["memory"] == macs["softmax"] > macs["two-mixers"] > macs["no-mlp"]
    assert {spec.mixer for spec in models.values()} == {models["softmax"].mixer}
    assert all(stage.mlp is None for stage in models["no-mlp"].stages)
    assert all(stage.mlp == stage.mixer for stage in models["two-mixers"].stages)


def test_a_stock_model_cannot_hold_other_mlps() -> None:
    rows = [STUDIES["future"]().row(label) for label in ("softmax", "no-mlp")]
    with pytest.raises(InputError, match=r"cannot hold row no-mlp: invalid mlp='none'; .*; the rows that run: --rows"):
        with_rows(describe("vit_tiny_patch16_224", num_classes=10), "", rows)


def test_words_of_a_row_follow_the_host() -> None:
    row = StudyRow("x", "", "support={window} kernel=depthwise mix=mean activation=none size=3")
    for model, expected in (("vit_kb_small_patch16_224", "window(7, alternate)"), ("plain32", "window(4, alternate)"),
                            ("swin_kb_tiny_patch4_window7_224", "window(7, alternate)")):  # fmt: skip
        assert {stage.mixer.text["support"] for stage in changed(named_host(model), row).stages} == {expected}
    row = StudyRow("x", "", STUDIES["depthwise"]().row("position").cells)
    stages = changed(named_host("swin_kb_tiny_patch4_window7_224"), row).stages
    linformer, nat = (StudyRow("x", "", STUDIES["kernels"]().row(label).cells) for label in ("linformer", "nat"))
    swin = named_host("swin_kb_tiny_patch4_window7_224")
    assert [stage.mixer.mix.r for stage in changed(swin, linformer).stages] == [784, 196, 49, 12]
    assert [stage.mixer.support.M for stage in changed(swin, nat).stages] == [7, 7, 7, 5]
    assert [stage.mixer.support.M for stage in changed(named_host("hierarchical"), nat).stages] == [3, 3]
    assert [stage.mixer.size for stage in stages] == [2 * stage.grid[0] - 1 for stage in stages] == [111, 55, 27, 13]


def test_a_stock_model_is_a_host() -> None:
    rows = [STUDIES["softmax"]().row(label) for label in ("softmax", "relu")]
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        models = with_rows(describe(name, num_classes=10), "", rows)
        assert list(models) == ["softmax", "relu"] and "position=none" not in str(models["relu"].mixer)
        _, spec = on_meta_device(models["relu"])
        assert spec.mixer == models["relu"].mixer and "activation=relu,count" in str(spec.mixer)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "models: resnet18 cannot be the host of a study: model: invalid class ResNet"),
        (
            "vit_linformer_test_patch16_64",
            "cannot hold row relu: invalid position=relative activation=relu,count in a host with mix=project",
        ),
    ],
)
def test_a_host_that_cannot_hold_a_row_says_why(name: str, said: str) -> None:
    rows = [STUDIES["softmax"]().row(label) for label in ("relu-absolute", "relu", "softmax-absolute")]
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        with_rows(describe(name, num_classes=10), "", rows)
    if name != "resnet18":
        assert str(caught.value).endswith("the rows that run: --rows relu-absolute softmax-absolute")


def test_labels_are_checked() -> None:
    rows = (StudyRow("a", "", "position=none"),) * 2
    with pytest.raises(ValueError, match="labels must be unique"):
        Study(name="x", title="", questions=(), baseline="a", rows=rows)
    with pytest.raises(ValueError, match="include the baseline"):
        Study(name="x", title="", questions=(), baseline="b", rows=rows[:1])
