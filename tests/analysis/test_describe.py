"""Equations, pictures and descriptions of every row, composed from cells."""

import io
import json

import pytest
from rich.console import Console

from kernelbank.analysis.describe import describe, diagram, generator, render
from kernelbank.analysis.equation import definitions, equation
from kernelbank.atlas import ROWS
from kernelbank.spec import Grouped, MixerSpec, Static
from kernelbank.spec.inventory import inventory, resolve

EQUATIONS = {
    "vit": "o_i = Σ_j softmax_j(q_i k_jᵀ / √d) v_j",
    "vit_relpos": "o_i = Σ_j softmax_j(q_i k_jᵀ / √d + p_ij) v_j",
    "vit activation=softmax(2)": "o_i = Σ_j softmax_j((q_i k_jᵀ / √d) / 2) v_j",
    "swin activation=relu,count": "o_i = Σ_{j∈V(i)} (relu(q_i k_jᵀ / √d + p_ij) / n_i) v_j",
    "linformer": "o_i = Σ_j softmax_j(q_i k'_jᵀ / √d) v'_j",
    "sigmoid_attention": "o_i = Σ_j sigmoid(q_i k_jᵀ / √d − log n) v_j",
    "identity_attention": "o_i = Σ_j ((q_i k_jᵀ / √d + p_ij) / n) v_j",
    "vit3": "o_i = Σ_j softmax_j(Σ_t q_{i+t} k_jtᵀ / √d) v_j",
    "vit_rope": "o_i = Σ_j softmax_j((R_i q_i) (R_j k_j)ᵀ / √d) v_j",
    "maxvit_grid activation=relu,count": "o_i = Σ_{j∈V(i)} (relu(q_i k_jᵀ / √d + p_ij) / n_i) v_j",
    "dwsa": "o_i = q_i ⊙ mean_j k_j + Σ_j p_ij k_j",
    "dwsa3": "o_i = Σ_t q_{i+t} ⊙ mean_j k_jt + Σ_j p_ij Σ_t k_jt",
    "dwsa support=self": "o_i = q_i ⊙ k_i + p_ii k_i",
    "dwsa support=neighborhood(3)": "o_i = q_i ⊙ mean_{j∈V(i)} k_j + Σ_{j∈V(i)} p_ij k_j",
    "dconv": "o_i = Σ_t (Σ_m π_m W_mt) x_{i+t} + Σ_m π_m b_m",
    "condconv_dw bias=False": "o_i = Σ_t x_{i+t} ⊙ (Σ_m π_m W_mt)",
    "ddwconv": "o_i = Σ_t q_{i+t} ⊙ k_t + b",
    "iddwconv": "o_i = Σ_t q_{i+t} ⊙ k_it",
    "se": "o_i = x_i ⊙ k",
    "external_attention": "o_i = Σ_j l1_j(softmax_i(q_i k_jᵀ)) v_j",
    "ffn": "o_i = Σ_j gelu(x_i k_jᵀ + c_j) v_j + b",
    "ffn activation=count": "o_i = Σ_j ((x_i k_jᵀ + c_j) / 4C) v_j + b",
    "conv": "o_i = Σ_t W_t x_{i+t} + b",
    "pool": "o_i = mean_t x_{i+t} − x_i",
}


@pytest.mark.parametrize(("text", "expected"), EQUATIONS.items())
def test_equation(text: str, expected: str) -> None:
    assert equation(MixerSpec.parse(text)) == expected


def test_definitions_follow_the_cells() -> None:
    assert "k = sigmoid(W_k z + b_k)" in definitions(MixerSpec.parse("se"))
    assert "π = softmax((P mean_j x_j) / 3)" in definitions(MixerSpec.parse("dconv mix=predict(softmax, 3) bias=False"))
    rope = definitions(MixerSpec.parse("dinov3"))
    assert "R_i: rotates channels (k, k + d/2) by y_i ω_k, then by x_i ω_k;  ω_k = 100^(−4k/d)" in rope
    assert "p_ij: learned, one value per head and offset i − j, counted in these steps" in definitions(
        MixerSpec.parse("maxvit_grid")
    )
    assert "k'_j = Σ_m E_mj k_m;  v'_j = Σ_m F_mj v_m;  j = 1 … 64" in definitions(MixerSpec.parse("linformer"))
    assert "q_i = ReLU(BN(W_q x_i));  y_i = BN(W_o ReLU(BN(o_i)))" in definitions(MixerSpec.parse("dwnet"))
    assert "n_i: the number of kernels that position i sees" in definitions(MixerSpec.parse("swin activation=count"))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_describe_is_json_and_renders(row: str, prefix: int) -> None:
    described = describe(row, 64, 4, (9, 8), prefix)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["spec"] == row and described["row"]["cite"] == ROWS[row].cite
    assert (described["cost_odd_block"] is None) == ("alternate" not in ROWS[row].support)
    out = io.StringIO()
    render(described, Console(file=out, width=200))
    shown = out.getvalue()
    for expected in (row, described["equation"], ROWS[row].cite, *described["cells"].values()):
        assert expected in shown
    for tensor in inventory(MixerSpec.parse(row), 64, 4, (9, 8), prefix):
        assert tensor.name in shown


def test_describe_lists_resets_and_the_resulting_spec() -> None:
    described = describe("vit kernel=depthwise", 64, 4, (4, 4))
    assert described["resets"] == [
        {"field": "activation", "old": "softmax", "new": "none"},
        {"field": "mix", "old": "stack", "new": "mean"},
    ]
    assert described["spec"] == "dwsa position=none" and described["row"]["name"] == "vit"
    out = io.StringIO()
    render(described, Console(file=out, width=120))
    assert "activation: softmax → none" in out.getvalue()


def test_describe_takes_a_spec_without_a_row() -> None:
    assert describe(MixerSpec.parse("vit"), 64, 4, (4, 4))["row"] is None


@pytest.mark.parametrize("row", ROWS)
def test_diagram_is_a_chain(row: str) -> None:
    lines = diagram(MixerSpec.parse(row), 64, 4, (14, 14), 1).splitlines()
    assert lines[0].strip() == "x" and sum(line.split()[:1] == ["y"] for line in lines) == 1
    assert all(line == line.rstrip() and len(line) <= 100 for line in lines)
    assert sum("◀" in line for line in lines) == (2 if "two_step" in ROWS[row].kernel else ROWS[row].bank != "box")


def test_diagram_shapes_and_bank() -> None:
    picture = diagram(MixerSpec.parse("swin"), 384, 6, (14, 14), 0)
    for expected in ("196 × 384", "6 × 196 × 49", "64 → 1 per kernel, 1 × 1", "sees 49",
                     "196 kernels, one per position", "6 × 49 scores per position"):  # fmt: skip
        assert expected in picture
    assert picture.count("dynamic conv") == 2 and picture.count("static conv q") == 1


GENERATED = ("reduce.weight", "key.weight", "value.weight", "predict.weight")


OTHERS = ["se bank=dynamic(5)", "involution kernel=grouped(host)", "dconv kernel=full(2)"]


@pytest.mark.parametrize("text", [*ROWS, *OTHERS])
def test_generator_formula_is_what_the_inventory_holds(text: str) -> None:
    spec = MixerSpec.parse(text)
    made = generator(spec, 64, 4)
    held = sum(t.numel for t in inventory(spec, 64, 4, (4, 4)) if t.name in GENERATED)
    if made is None:
        assert not any(t.name.startswith(("predict", "reduce")) for t in inventory(spec, 64, 4, (4, 4)))
        return
    symbols = {
        "K": resolve(spec.bank.K, 64, 4) if isinstance(spec.bank, Static) else 0,
        "G": resolve(spec.kernel.G, 64, 4) if isinstance(spec.kernel, Grouped) else 0,
        "C": 64, "C_in": 64, "C_out": 64,
    }  # fmt: skip
    for formula, params in ((made.formula, made.params), (made.whole_formula, made.whole_params)):
        assert eval(formula.replace("·", "*").replace("/", "//"), dict(symbols)) == params
    assert made.params == held


def test_generator_makes_the_papers_argument() -> None:
    """Section 4.3: C*H*W*C_in*C_out for a full kernel, C*C_in + C*C_out for two steps, C*H*W*C depth-wise, C*K."""
    vit, depthwise, predicted = (generator(MixerSpec.parse(t), 384, 6) for t in ("vit", "dwsa3", "condconv"))
    assert vit and depthwise and predicted
    assert (vit.formula, vit.whole_formula) == ("C·C_in + C·C_out", "C·C_in·C_out")
    assert (depthwise.formula, depthwise.whole_formula) == ("C·3·3·C", "C·3·3·C_in·C_out")
    assert (predicted.formula, predicted.ratio) == ("C·K", 9 * 384 * 384 / 8)
    assert generator(MixerSpec.parse("ffn"), 384, 6) is None
