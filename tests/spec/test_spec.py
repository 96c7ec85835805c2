"""The record: text, JSON, resets, legality, and the error lines that users see."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import choose_pipeline, specs

from kernelbank.atlas import ROWS
from kernelbank.spec.axes import AXES, Channels, Dynamic, Full, Grouped, Mean, Predict, Static, TwoStep, Value, Window
from kernelbank.spec.mixer_spec import CELLS, MixerSpec, SpecError, _reset, _violations, read_stages
from kernelbank.spec.pipeline import STEPS, Step, read_pipeline, show_pipeline, softmax


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_legal_prints_as_its_name_and_round_trips(row: str) -> None:
    spec = MixerSpec.parse(row)
    assert str(spec) == row and not spec.resets
    assert MixerSpec.from_json(spec.to_json()) == spec


@settings(max_examples=300)
@given(specs())
def test_text_and_json_round_trip_exactly(spec: MixerSpec) -> None:
    assert MixerSpec.parse(str(spec)) == spec
    assert MixerSpec.from_json(spec.to_json()) == spec
    assert MixerSpec.from_json(json.loads(spec.to_json())) == spec
    assert not MixerSpec.parse(str(spec)).resets


@settings(max_examples=200)
@given(specs(), specs())
def test_the_text_has_the_fewest_cells_and_diff_is_exact(a: MixerSpec, b: MixerSpec) -> None:
    distances = {row: len(a.diff(MixerSpec.parse(row))) for row in ROWS}
    row, *cells = (
        str(a).split(" ")
        if "(" not in str(a)
        else (str(a).split(" ")[0], *a.diff(MixerSpec.parse(str(a).split(" ")[0])))
    )
    assert len(cells) == min(distances.values())
    assert row == min(distances, key=lambda name: distances[name])
    assert a.diff(b).keys() == {n for n in CELLS if getattr(a, n) != getattr(b, n)}
    assert not a.diff(a) and {n: v[::-1] for n, v in b.diff(a).items()} == a.diff(b)


@settings(max_examples=200)
@given(st.data())
def test_pipelines_round_trip(data: st.DataObject) -> None:
    steps = choose_pipeline(lambda options: data.draw(st.sampled_from(options)))
    assert read_pipeline(show_pipeline(steps)) == steps


@given(st.floats(allow_nan=False, allow_infinity=False).filter(bool))
def test_scales_round_trip_at_every_float(x: float) -> None:
    steps = (Step("scale", x), Step("exp"), Step("l1"))
    assert read_pipeline(show_pipeline(steps)) == steps


@settings(max_examples=300)
@given(st.fixed_dictionaries({name: st.sampled_from(axis.examples) for name, axis in AXES.items()}))
def test_random_cells_are_a_record_or_one_error_line(cells: dict[str, object]) -> None:
    try:
        spec = MixerSpec(**cells)
    except SpecError as error:
        assert "\n" not in str(error) and "legal" in str(error) and str(error).split("=")[0] in CELLS
    else:
        assert MixerSpec.parse(str(spec)) == spec


@settings(max_examples=300)
@given(st.sampled_from(sorted(ROWS)), st.data())
def test_resets_are_smallest_and_typed_cells_stay(row: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(CELLS), unique=True, min_size=1, max_size=3))
    typed = {name: data.draw(st.sampled_from(AXES[name].examples)) for name in names}
    text = " ".join([row, *(f"{n}={AXES[n].show(v).replace(' ', '')}" for n, v in typed.items())])
    base = MixerSpec.parse(row).cells | typed
    resettable = [n for n in ("position", "activation", "mix", "support") if n not in typed]
    works = {n: not any(_violations(_reset(base, (n,)))) for n in resettable}
    try:
        spec = MixerSpec.parse(text)
    except SpecError:
        assert any(_violations(base)) and not any(works.values())
        return
    assert all(getattr(spec, n) == v for n, v in typed.items())
    assert {r.field for r in spec.resets} <= set(resettable)
    if not any(_violations(base)):
        assert not spec.resets
    elif any(works.values()):
        assert [r.field for r in spec.resets] == [next(n for n in resettable if works[n])]


def test_the_designs_examples() -> None:
    assert MixerSpec.parse("swin activation=relu,count").activation == (Step("relu"), Step("count"))
    spec = MixerSpec.parse("vit kernel=depthwise mix=mean")
    assert spec.mix == Mean() and [str(r) for r in spec.resets] == ["activation: softmax -> none"]
    assert MixerSpec.parse("vit bank=dynamic( r = 4 )") == MixerSpec.parse("vit bank=dynamic(4)")
    assert MixerSpec.parse("linformer bias=False").bias is False
    assert MixerSpec.parse("ffn").bank == Static(Channels(4)) and MixerSpec.parse("ffn").kernel == TwoStep(1)


def test_softmax_is_sugar_only_where_it_reads_back() -> None:
    assert read_pipeline("softmax") == (Step("exp"), Step("l1"))
    assert show_pipeline(read_pipeline("scale(0.5),exp,l1")) == "softmax(2)"
    assert show_pipeline(read_pipeline("scale(-0.5),exp,l1")) == "scale(-0.5),softmax"
    assert read_pipeline("softmax@positions") == (Step("exp"), Step("l1", axis="positions"))
    assert show_pipeline(softmax(4.0, "positions")) == "softmax(4)@positions"


def test_cells_only_need_a_base() -> None:
    base = MixerSpec.parse("swin")
    assert MixerSpec.parse("activation=relu,count", base) == MixerSpec.parse("swin activation=relu,count")
    with pytest.raises(SpecError, match="cells only"):
        MixerSpec.parse("activation=relu,count")


def test_alternate_is_resolved_by_the_block_inside_its_stage() -> None:
    swin = MixerSpec.parse("swin")
    assert [swin.at_block(i).support for i in range(3)] == [Window(7, 0), Window(7, 3), Window(7, 0)]
    assert MixerSpec.parse("vit").at_block(1) == MixerSpec.parse("vit")


def test_roles_are_derived_from_the_steps() -> None:
    roles = {
        t: MixerSpec.parse(f"vit activation={t}").roles
        for t in ("softmax", "relu,count", "layernorm", "center", "softmax@positions")
    }
    assert roles == {
        "softmax": ("normalisation", "communication", "non-linearity"), "relu,count": ("non-linearity",),
        "layernorm": ("normalisation", "communication"), "center": ("communication",),
        "softmax@positions": ("normalisation", "non-linearity"),
    }  # fmt: skip


def test_explain_lists_cells_roles_and_resets() -> None:
    text = MixerSpec.parse("swin kernel=depthwise").explain()
    assert "dwsa_window" in text and "reset      mix: stack -> mean" in text


def test_stages() -> None:
    assert [str(s) for s in read_stages("dwnet | dwnet | swin | swin", 4)] == ["dwnet", "dwnet", "swin", "swin"]
    assert len(read_stages("vit", 3)) == 3
    with pytest.raises(SpecError, match="2 records for 4 stages"):
        read_stages("vit | swin", 4)


def test_records_are_frozen_hashable_and_equal_by_cells() -> None:
    spec = MixerSpec.parse("vit kernel=depthwise")
    assert spec == MixerSpec.parse("dwsa position=none") and len({spec, MixerSpec.parse("dwsa position=none")}) == 1
    with pytest.raises(FrozenInstanceError):
        spec.size = 3  # type: ignore[misc]


IMPOSSIBLE = {  # text: what the one line must say
    "vit kernel=full": "kernel=full is not legal here: full needs bank static.*legal: two_step, depthwise, grouped",
    "vit mix=mean": "mix=mean is not legal here: kernel two_step stacks.*legal: stack, project",
    "dwsa mix=stack": "mix=stack is not legal here: kernel depthwise applies one kernel",
    "vit mix=predict(softmax)": "mix=predict.softmax. is not legal here",
    "dwsa mix=predict(softmax)": "predict mixes a bank of learned kernels: it needs bank static",
    "conv support=window(7)": "support=window.7. is not legal here: the kernels of bank static.1. belong to no pos",
    "conv position=relative": "position=relative is not legal here",
    "vit position=relative mix=project(4)": "position=relative is not legal here: relative needs two_step with stack",
    "involution position=relative": "relative needs two_step with stack, or depthwise with mean",
    "strided_bank position=relative": "stride=2 generates on the pooled grid",
    "strided_bank support=window(7)": "stride=2 generates on the pooled grid",
    "vit support=window(7) mix=project(64)": "project.64. mixes the kernels of all positions",
    "vit support=self": "self needs a one-step kernel",
    "conv bank=static(2)": None,  # mean is inherited but predict is no reset target
    "ffn bank=static(1)": "K must be > 1",
    "pool size=1": "size=1 is not legal here.*legal: 3",
    "pool kernel=depthwise": "kernel=depthwise is not legal here: bank box.*legal: grouped.1.",
    "vit activation=none": "activation=none is not legal here.*identity",
    "dwsa activation=relu": "activation=relu is not legal here.*legal: none",
    "vit activation=batchnorm,batchnorm": "at most one batchnorm",
    "swin3 support=window(7, pad=timm)": "pad=timm is the padding of published size-1 checkpoints",
    "vit activation=relu@positions": "relu@positions is not legal",
    "vit activation=batchnorm@positions": "batchnorm@positions is not legal",
    "vit activation=relu,,count": "activation: empty step",
    "vit activation=relu(2)": "relu takes no argument",
    "vit activation=scale": "scale.None. is not legal",
    "vit activation=scale(0)": "legal: scale.x., x finite and non-zero",
    "vit activation=scale(inf)": "x finite and non-zero",
    "vit activation=softmax(0)": "tau finite and > 0",
    "vit activation=softmax(nan)": "tau finite and > 0",
    "vit activation=softmx": "unknown step 'softmx'; did you mean 'softmax'",
    "vit activation=l1@queries": "@queries is not legal",
    "vit kernel=grouped(C)": "kernel: grouped: G=C is not legal.*depthwise",
    "vit kernel=full(C)": "kernel: full: groups=C is not legal.*depthwise",
    "vit kernel=two_step(0)": "heads=0, legal: a whole number >= 1|heads=0 is not legal",
    "vit support=window(1)": "support: window: M=1 is not legal; legal: a whole number >= 2|M=1, legal",
    "vit support=window(7, 7)": "support: window: shift=7 is not legal; legal: 0 to 6",
    "vit support=window(7, shift=-1)": "shift=-1",
    "vit support=neighborhood(1)": "for M = 1 write self",
    "vit support=neighborhood(4)": "an odd number >= 3",
    "vit support=window": "M is missing",
    "vit support=window(7, 0, masked, 1)": "it is written window",
    "vit support=window(7, M=7)": "M twice",
    "vit support=window(M=7, 3)": "it is written window",
    "vit support=window(7, size=3)": "no argument 'size'",
    "vit support=window()": "empty parentheses",
    "vit support=window(7))": "unbalanced parentheses",
    "vit support=window(7)x": "nothing may follow",
    "vit bank=static(C/2)": "a multiple of the width",
    "vit bank=dynamic(0)": "r=0",
    "conv bank=static(1_000)": "a whole number",
    "conv bank=static(+3)": "a whole number",
    "conv bank=static(\uff11\uff12)": "a whole number",
    "vit activation=softmax(1_0)": "must be a number",
    "vit activation=(relu)": "a step starts with its name",
    "conv bank=static(" + "9" * 600 + ")": "a value of 608 characters",
    "vit bank=dynamic(squash=relu)": "identity or sigmoid or tanh",
    "vit size=2": "size: 2 is not legal; legal: 1, 3, 5, 7",
    "vit size=three": "size: three is not legal",
    "vit bias=yes": "bias: yes is not legal; legal: True, False",
    "vit position=absolute": "unknown value 'absolute'",
    "vit frame=": "frame: empty value",
    "vit size=3 size=5": "size: typed twice",
    "vit suport=all": "unknown field 'suport'; did you mean 'support'",
    "vit mix": "'mix' is not a cell",
    "vitt": "unknown row 'vitt'; did you mean 'vit'",
    "": "empty record",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_records_cannot_be_built(text: str) -> None:
    with pytest.raises(SpecError, match=IMPOSSIBLE[text]) as caught:
        MixerSpec.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("document", "message"), [
    ("[]", "JSON object"), ("[" * 100_000, "JSON object"), ("{", "JSON object"), ("{}", "spec_version"),
    ('{"spec_version": 2}', "spec_version: 2"), ('{"spec_version": 1}', "bank: missing"),
])  # fmt: skip
def test_bad_json_is_one_clear_error(document: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MixerSpec.from_json(document)


def test_unknown_json_fields_are_errors() -> None:
    data = json.loads(MixerSpec.parse("vit").to_json()) | {"suport": "all"}
    with pytest.raises(SpecError, match="unknown field 'suport'"):
        MixerSpec.from_json(data)


@pytest.mark.parametrize("value", [Full, Grouped, TwoStep])
def test_booleans_are_no_counts(value: type[Value]) -> None:
    with pytest.raises(SpecError):
        value(True)


def test_values_are_checked_in_python_too() -> None:
    for build in (lambda: Dynamic(0), lambda: Window(7, 9), lambda: Predict("relu"), lambda: Step("relu", 2.0),
                  lambda: Predict("softmax", 10**400), lambda: Step("scale", 10**400)):  # fmt: skip
        with pytest.raises(SpecError):
            build()
    with pytest.raises(SpecError, match="kernel"):
        MixerSpec(**(MixerSpec.parse("vit").cells | {"kernel": "two_step"}))


def test_every_step_states_its_equation() -> None:
    assert all(kind.equation for kind in STEPS.values())


def test_importing_the_spec_or_the_package_imports_no_torch() -> None:
    code = (
        "import sys, kernelbank.spec, kernelbank.spec.inventory, kernelbank.records; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
