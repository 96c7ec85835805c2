"""A spec: its text, JSON, resets, what can be built, and the error lines that users see."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import choose_pipeline, specs

from kernelbank.atlas import ROWS
from kernelbank.errors import SpecError
from kernelbank.spec.arguments import Channels
from kernelbank.spec.axes import AXES, Dynamic, Full, Grouped, Mean, Predict, Static, TwoStep, Value, Window
from kernelbank.spec.legality import is_valid, reset
from kernelbank.spec.mixer_spec import CELLS, MixerSpec, read_stages
from kernelbank.spec.pipeline import STEPS, Step, read_pipeline, show_pipeline, softmax
from kernelbank.spec.text import words


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_valid_prints_as_its_name_and_round_trips(row: str) -> None:
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
    row, *cells = words(str(a))
    assert len(cells) == distances[row] == min(distances.values())
    assert a.diff(b).keys() == {n for n in CELLS if getattr(a, n) != getattr(b, n)}
    assert not a.diff(a) and {n: v[::-1] for n, v in b.diff(a).items()} == a.diff(b)


NATURAL = {  # what a person types: how it prints
    "swin support=window(4, alternate)": None, "nat support=neighborhood(9)": None, "dwconv size=3": None,
    "swin activation=identity,count": None, "swin support=window(4)": None, "swin3 support=window(3)": None,
    "dwsa_window support=window(4, alternate)": None, "linformer mix=project(8)": None, "ffn bank=static(2C)": None,
    "condconv bank=static(4)": None, "dconv mix=predict(softmax, 30, 4)": None,
    "strided_bank bank=dynamic(stride=3)": None, "se bank=dynamic(4, sigmoid)": None, "dwnet size=3": None,
    "external_attention bank=static(32)": None, "involution kernel=grouped(8)": None, "ddwconv size=3": None,
    "vit kernel=depthwise": "dwsa position=none", "vit position=relative size=3": "vit_relpos size=3",
    "vit activation=softmax(2) position=relative": "vit_relpos activation=softmax(2)",
    "dwconv size=3 frame=bn_relu": "dwnet size=3",
}  # fmt: skip


@pytest.mark.parametrize(("typed", "text"), NATURAL.items())
def test_a_spec_stays_what_a_person_called_it(typed: str, text: str | None) -> None:
    assert str(MixerSpec.parse(typed)) == (text or typed)


@pytest.mark.parametrize("row", ["swin", "swin3", "dwsa_window"])
@pytest.mark.parametrize("support", [Window(M, shift) for M in (2, 5, 9) for shift in (0, 1, "alternate")])
def test_another_window_keeps_the_row(row: str, support: Window) -> None:
    assert str(replace(MixerSpec.parse(row), support=support)) == f"{row} support={support}"


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
def test_random_cells_are_a_spec_or_one_error_line(cells: dict[str, object]) -> None:
    try:
        spec = MixerSpec(**cells)
    except SpecError as error:
        assert re.fullmatch(rf"invalid ({'|'.join(CELLS)})=.*: .*; expected .*", str(error))
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
    works = {n: is_valid(reset(base, (n,))) for n in resettable}
    try:
        spec = MixerSpec.parse(text)
    except SpecError:
        assert not is_valid(base) and not any(works.values())
        return
    assert all(getattr(spec, n) == v for n, v in typed.items())
    assert {r.field for r in spec.resets} <= set(resettable)
    if is_valid(base):
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
    with pytest.raises(SpecError, match="expected 1 or 4 specs for 4 stages, got 2"):
        read_stages("vit | swin", 4)


def test_specs_are_frozen_hashable_and_equal_by_cells() -> None:
    spec = MixerSpec.parse("vit kernel=depthwise")
    assert spec == MixerSpec.parse("dwsa position=none") and len({spec, MixerSpec.parse("dwsa position=none")}) == 1
    with pytest.raises(FrozenInstanceError):
        spec.size = 3  # type: ignore[misc]


IMPOSSIBLE = {  # text: what the one line must say
    "vit kernel=full": "invalid kernel=full: full needs bank static.*expected two_step, depthwise, grouped",
    "vit mix=mean": "invalid mix=mean: kernel two_step stacks.*expected stack, project",
    "dwsa mix=stack": "invalid mix=stack: kernel depthwise applies one kernel",
    "vit mix=predict(softmax)": "invalid mix=predict.softmax.: ",
    "dwsa mix=predict(softmax)": "predict mixes a bank of learned kernels, so it needs bank static",
    "conv support=window(7)": "invalid support=window.7.: the kernels of bank static.1. belong to no position",
    "conv position=relative": "invalid position=relative: ",
    "vit position=relative mix=project(4)": "invalid position=relative: relative needs kernel two_step with mix stack",
    "involution position=relative": "relative needs kernel two_step with mix stack, or kernel depthwise with mix mean",
    "strided_bank position=relative": "stride=2 generates kernels on the pooled grid",
    "strided_bank support=window(7)": "stride=2 generates kernels on the pooled grid",
    "vit support=window(7) mix=project(64)": "project.64. mixes the kernels of all positions",
    "vit support=self": "self needs a one-step kernel",
    "conv bank=static(2)": None,  # mean is inherited but predict is no reset target
    "ffn bank=static(1)": "K must be > 1",
    "pool size=1": "invalid size=1.*expected 3",
    "pool kernel=depthwise": "invalid kernel=depthwise: bank box.*expected grouped.1.",
    "vit activation=none": "invalid activation=none.*identity",
    "dwsa activation=relu": "invalid activation=relu.*expected none",
    "vit activation=batchnorm,batchnorm": "at most one batchnorm",
    "swin3 support=window(7, pad=timm)": "pad=timm is the padding of published checkpoints of size 1",
    "vit activation=relu@positions": "invalid activation=relu@positions",
    "vit activation=batchnorm@positions": "invalid activation=batchnorm@positions",
    "vit activation=relu,,count": "invalid activation=relu,,count: empty step",
    "vit activation=relu(2)": "invalid activation=relu.2.0.; expected no argument",
    "vit activation=scale": "invalid activation=scale.None.",
    "vit activation=scale(0)": "expected scale.x., x finite and non-zero",
    "vit activation=scale(inf)": "x finite and non-zero",
    "vit activation=softmax(0)": "tau finite and > 0",
    "vit activation=softmax(nan)": "tau finite and > 0",
    "vit activation=softmx": "unknown step 'softmx'; did you mean 'softmax'",
    "vit activation=l1@queries": "unknown axis @queries",
    "vit kernel=grouped(C)": "invalid kernel=grouped.C.: G=C; .*depthwise",
    "vit kernel=full(C)": "invalid kernel=full.C.: groups=C; .*depthwise",
    "vit kernel=two_step(0)": "invalid kernel=two_step.0.: heads=0; expected a whole number >= 1",
    "vit support=window(1)": "invalid support=window.1.: M=1; expected a whole number >= 2",
    "vit support=window(7, 7)": "invalid support=window.7,7.: shift=7; expected 0 to 6",
    "vit support=window(7, shift=-1)": "shift=-1",
    "vit position=rope(0)": "invalid position=rope.0.: theta=0; expected a finite number > 0",
    "vit position=rope(100, half, unit, side=16)": "side=16; expected grid with coordinates=unit",
    "vit position=rope(100, coordinates=unit, origin=1)": "origin=1; expected 0 with coordinates=unit",
    "dwsa position=rope": "rope needs kernel two_step with mix stack",
    "ffn position=rope": "the kernels of bank static.4C. have no position",
    "strided_bank position=rope": "stride=2 generates kernels on the pooled grid",
    "vit size=3 position=rope": "a patch of size 3 holds operands of several positions",
    "vit support=window(7, pad=timm) position=rope": "pad=timm moves the positions of the grid",
    "vit support=grid(1)": "invalid support=grid.1.: M=1; expected a whole number >= 2",
    "strided_bank support=grid(7)": "stride=2 generates kernels on the pooled grid",
    "vit support=neighborhood(1)": "for M = 1 write self",
    "vit support=neighborhood(4)": "an odd number >= 3",
    "vit support=window": "M is missing",
    "vit support=window(7, 0, masked, 1)": "; expected window.M, shift=0, pad=masked.",
    "vit support=window(7, M=7)": "M is given twice",
    "vit support=window(M=7, 3)": "; expected window.M, shift=0, pad=masked.",
    "vit support=window(7, size=3)": "unknown argument 'size'",
    "vit support=window()": "empty parentheses",
    "vit support=window(7))": "expected balanced parentheses",
    "vit support=window(7)x": "expected nothing after the closing parenthesis",
    "vit bank=static(C/2)": "a multiple of the width",
    "vit bank=dynamic(0)": "r=0",
    "conv bank=static(1_000)": "a whole number",
    "conv bank=static(+3)": "a whole number",
    "conv bank=static(\uff11\uff12)": "a whole number",
    "vit activation=softmax(1_0)": "expected a number",
    "vit activation=(relu)": "expected a step that starts with its name",
    "conv bank=static(" + "9" * 600 + ")": "a value of 608 characters",
    "vit bank=dynamic(squash=relu)": "identity or sigmoid or tanh",
    "vit size=2": "invalid size=2; expected 1, 3, 5, 7",
    "vit size=three": "invalid size=three",
    "vit bias=yes": "invalid bias=yes; expected True, False",
    "vit position=absolute": "invalid position=absolute; expected none, relative",
    "vit frame=": "invalid frame: empty value",
    "vit size=3 size=5": "size is typed twice",
    "vit suport=all": "unknown field 'suport'; did you mean 'support'",
    "vit mix": "invalid cell 'mix'",
    "vitt": "unknown row 'vitt'; did you mean 'vit'",
    "": "invalid spec ''",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_specs_cannot_be_built(text: str) -> None:
    with pytest.raises(SpecError, match=IMPOSSIBLE[text]) as caught:
        MixerSpec.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("document", "message"), [
    ("[]", "expected a JSON object, got list"), ("[" * 100_000, "expected a JSON object"),
    ('{"a":' * 100_000, "expected a JSON object"), ("{", "expected a JSON object"), ("{}", "got NoneType"),
    ('{"spec_version": ' + "9" * 5000 + "}", "expected a JSON object"), ("NaN", "got float"), ("null", "got NoneType"),
    ('{"spec_version": 2}', "invalid spec_version; expected 1, got 2"), ('{"spec_version": 1}', "bank is missing"),
    ('{"spec_version": 1.0}', "expected 1, got float"), ('{"spec_version": true}', "expected 1, got bool"),
    ('{"spec_version": [1]}', "expected 1, got list"), (None, "expected a JSON object, got NoneType"),
    (b"{}", "expected a JSON object, got bytes"),
])  # fmt: skip
def test_bad_json_is_one_clear_error(document: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        MixerSpec.from_json(document)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("field", CELLS)
@pytest.mark.parametrize("value", [1, 1.5, True, None, [], {"a": 1}, 10**400])
def test_json_cells_of_another_type_are_errors(field: str, value: object) -> None:
    data = json.loads(MixerSpec.parse("vit").to_json()) | {field: value}
    with pytest.raises(SpecError, match=f"^invalid {field}; expected text, got {type(value).__name__}$"):
        MixerSpec.from_json(data)


@pytest.mark.parametrize("name", [3, None, "size=3", "\x1b[31m"])
def test_unknown_json_names_are_errors(name: object) -> None:
    data = json.loads(MixerSpec.parse("vit").to_json()) | {name: "all"}
    with pytest.raises(SpecError, match="unknown field") as caught:
        MixerSpec.from_json(data)
    assert "\x1b" not in str(caught.value)


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
