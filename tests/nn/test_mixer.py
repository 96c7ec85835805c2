"""The module: agreement with timm's layers and other public code, state dicts, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, Mlp, SqueezeExcite, gen_relative_position_index
from timm.models.metaformer import Pooling
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.utils import prune

from kernelbank import Mixer, MixerSpec, SpecError
from kernelbank.atlas import ROWS
from kernelbank.spec.inventory import inventory


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).detach().abs().max() / (1 + b.detach().abs().max())) < 1e-12


# ---- public code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_timm_attention_loads_strictly_and_agrees(qk_norm: bool) -> None:
    theirs = randomised(Attention(24, 3, qkv_bias=True, qk_norm=qk_norm, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    ours = Mixer("vit_qk_norm" if qk_norm else "vit", 24, 3, (4, 5), prefix=1, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    assert close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (21, 14), (10, 10), (9, 15), (5, 16), (6, 4)])
@pytest.mark.parametrize("shift", [0, 3])
def test_timm_swin_block_loads_strictly_and_agrees(size: tuple[int, int], shift: int) -> None:
    """Sides that windows fill, sides they do not (timm rolls, then pads, unmasked), and sides below the window."""
    theirs = randomised(SwinTransformerBlock(16, size, num_heads=2, window_size=7, shift_size=shift))
    theirs.attn.fused_attn = False
    spec = MixerSpec.parse(f"swin support=window(7, shift={shift}, pad=timm)")
    ours = Mixer(spec, 16, 2, size, dtype=torch.float64)
    ours.load_state_dict(theirs.attn.state_dict(), strict=True)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    y = ours(x.flatten(1, 2)).unflatten(1, size)
    # timm hides by adding -100: a logit gap this size leaves exp(-100), far below float64's eps.
    assert close(y, theirs._attn(x))


def test_masked_padding_equals_timm_where_there_is_none() -> None:
    x = torch.randn(1, 196, 16, dtype=torch.float64)
    masked = randomised(Mixer("swin support=window(7, shift=3)", 16, 2, (14, 14)))
    for pad in ("timm", "mmpretrain"):
        other = Mixer(f"swin support=window(7, shift=3, pad={pad})", 16, 2, (14, 14), dtype=torch.float64)
        other.load_state_dict(masked.state_dict())
        assert close(other(x), masked(x))


@pytest.mark.parametrize("grid", [(6, 5), (4, 8), (8, 4), (5, 4), (4, 4), (8, 9)])
def test_mmpretrain_padding_is_pad_then_roll_with_pads_as_kernels(grid: tuple[int, int]) -> None:
    """mmpretrain's ShiftWindowMSA written out: zeros padded bottom and right after the norm, roll, windows, mask, back,
    crop; and no shift along either axis where the shorter side is the window."""
    ours, M = randomised(Mixer("swin support=window(4, shift=2, pad=mmpretrain)", 8, 2, grid)), 4
    x, p = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64), ours.tensors()
    shift = 0 if min(grid) == M else 2
    (H, W), (rows, columns) = grid, (-(-side // M) for side in grid)
    padded = F.pad(x.view(1, H, W, 8), (0, 0, 0, columns * M - W, 0, rows * M - H)).roll((-shift, -shift), (1, 2))
    ids = torch.zeros(rows * M, columns * M)
    if shift:
        parts = (slice(0, -M), slice(-M, -shift), slice(-shift, None))
        for number, (y, z) in enumerate((y, z) for y in parts for z in parts):
            ids[y, z] = number

    def windows(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (rows, M)).unflatten(3, (columns, M)).transpose(2, 3).flatten(0, 2).flatten(1, 2)

    w, region = windows(padded), windows(ids[None, :, :, None])[..., 0]
    q, k, v = (
        F.linear(w, p[f"{n}.weight"], p[f"{n}.bias"]).unflatten(-1, (2, 4)).transpose(1, 2)
        for n in ("q", "key", "value")
    )
    at = torch.stack(torch.meshgrid(torch.arange(M), torch.arange(M), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None, :] + M - 1
    bias = p["table.weight"][:, offset[0], offset[1]]
    hidden = region[:, None, :, None] != region[:, None, None, :]
    a = (q @ k.mT / 2 + bias).masked_fill(hidden, -torch.inf).softmax(-1)
    o = F.linear((a @ v).transpose(1, 2).flatten(2), p["out.weight"], p["out.bias"])
    o = o.unflatten(0, (1, rows, columns)).unflatten(3, (M, M)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    assert close(ours(x), o.roll((shift, shift), (1, 2))[:, :H, :W].flatten(1, 2))


def test_kernels_of_an_ffn_saved_by_version_0_1_load() -> None:
    """There they are stacked by head: (1, K, C, 1, 1), (1, K) and (1, C, K)."""
    ours = randomised(Mixer("ffn", 12, 3, (2, 3)))
    state = ours.state_dict()
    old = {"key.weight": state["key.weight"][None, :, :, None, None], "key.bias": state["key.bias"][None],
           "value.weight": state["value.weight"][None], "value.bias": state["value.bias"]}  # fmt: skip
    again = Mixer("ffn", 12, 3, (2, 3), dtype=torch.float64)
    again.load_state_dict(old, strict=True)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    assert torch.equal(again(x), ours(x))
    with pytest.raises(RuntimeError, match=r"key\.weight"):
        again.load_state_dict({**old, "key.weight": old["key.weight"].transpose(1, 2)})


def test_timm_mlp_loads_strictly_and_agrees() -> None:
    theirs = randomised(Mlp(12, 48))
    ours = Mixer("ffn", 12, 3, (2, 3), dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    assert close(ours(x), theirs(x))


def test_timm_squeeze_excitation_agrees() -> None:
    theirs = randomised(SqueezeExcite(32, rd_ratio=1 / 16, rd_divisor=1))
    ours = Mixer("se", 32, 1, (4, 3), dtype=torch.float64)
    names = {"reduce": theirs.fc1, "key": theirs.fc2}
    ours.load_state_dict(
        {f"{n}.{k}": t.flatten(1) if t.ndim > 1 else t for n, m in names.items() for k, t in m.state_dict().items()}
    )
    x = torch.randn(2, 32, 4, 3, dtype=torch.float64)
    assert close(ours(x.flatten(2).mT), theirs(x).flatten(2).mT)


def test_timm_pooling_agrees() -> None:
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    assert close(Mixer("pool", 8, 1, (5, 4))(x.flatten(2).mT), Pooling(3)(x).flatten(2).mT)


@pytest.mark.parametrize(("row", "groups"), [("condconv", 1), ("condconv_dw", 8)])
def test_timm_condconv_agrees(row: str, groups: int) -> None:
    theirs = randomised(CondConv2d(8, 8, 3, padding=1, groups=groups, bias=True, num_experts=8))
    ours = randomised(Mixer(row, 8, 1, (5, 4)))
    p = ours.tensors()
    with torch.no_grad():
        p["weight"].copy_(theirs.weight.view(p["weight"].shape))
        p["bias"].copy_(theirs.bias)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    routing = torch.sigmoid(F.linear(x.mean((2, 3)), p["predict.weight"], p["predict.bias"]))
    assert close(ours(x.flatten(2).mT), theirs(x, routing).flatten(2).mT)


def test_the_class_token_shares_timms_order_of_prefix_entries() -> None:
    """BEiT: three entries after the offsets, class to grid, grid to class, class to class."""
    theirs = gen_relative_position_index((3, 4), class_token=True)
    assert torch.equal(Mixer("vit_relpos", 8, 2, (3, 4), prefix=1).geometry.offsets, theirs)


# ---- state and construction ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_the_module_is_its_inventory(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    mixer = Mixer(spec, 32, 4, (4, 4), prefix=1)
    listed = inventory(spec, 32, 4, (4, 4), 1)
    assert {n: tuple(p.shape) for n, p in mixer.named_parameters()} == {t.name: t.shape for t in listed if not t.buffer}
    assert set(mixer.state_dict()) == {t.name for t in listed}
    copied = copy.deepcopy(mixer).eval()
    x = torch.randn(2, 17, 32)
    assert torch.equal(copied(x), mixer.eval()(x))


# Parameters whose gradient is zero by algebra. A key bias shifts all logits of a query alike, which softmax and
# LayerNorm over the kernels remove; a q bias shifts all logits of a kernel alike, which softmax@positions removes; a
# bias in front of a BatchNorm in training is a mean that the norm removes.
ZERO_GRADIENT = {row: {"key.bias"} for row in ("vit", "vit_relpos", "swin", "maxvit_grid", "nat", "strided_bank",
                                               "vit3", "swin3", "layernorm_attention")}  # fmt: skip
ZERO_GRADIENT["layernorm_attention"].add("value.bias")  # the kernels' weights sum to zero
ZERO_GRADIENT |= {"external_attention": {"q.bias"}, "dwnet": {"bias"}, "ddwconv": {"bias"}}
ZERO_GRADIENT["vit_qk_norm"] = {"k_norm.bias"}  # it adds the same to all scores of a query


@pytest.mark.parametrize("row", [row for row in ROWS if row != "pool"])  # which has none
def test_every_parameter_has_a_gradient(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    mixer = Mixer(spec, 32, 4, (8, 8), prefix=1, dtype=torch.float64)
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    mixer(x := torch.randn(2, 65, 32, dtype=torch.float64)).mul(torch.randn_like(x)).sum().backward()
    zero = {name for name, p in mixer.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-10}
    assert zero == ZERO_GRADIENT.get(row, set())


def test_meta_construction_then_materialise() -> None:
    mixer = Mixer("swin support=window(2, shift=1)", 8, 2, (3, 3), device="meta").to_empty(device="cpu")
    mixer.reset_parameters()
    assert mixer(torch.randn(1, 9, 8)).isfinite().all()


def test_temperature_replaces_tau_in_training_only_and_is_not_saved() -> None:
    mixer = Mixer("dconv", 8, 1, (3, 3), dtype=torch.float64)
    nn.init.normal_(mixer.predict.weight, std=3)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    before = mixer(x)
    mixer.temperature = 30.0
    assert not torch.allclose(mixer(x), before) and torch.equal(mixer.eval()(x), before)
    assert "temperature" not in mixer.state_dict()


def test_another_grid_is_served_where_no_parameter_depends_on_it() -> None:
    swin = Mixer("swin support=window(2)", 8, 2, (4, 4))
    assert swin(torch.randn(1, 15, 8), (3, 5)).shape == (1, 15, 8)
    with pytest.raises(SpecError, match=r"grid=\(3, 5\).*table.weight"):
        Mixer("vit_relpos", 8, 2, (4, 4))(torch.randn(1, 15, 8), (3, 5))


def test_parametrised_pruned_and_tied_weights_are_what_they_compute_to() -> None:
    x = torch.randn(1, 4, 8)
    mixer = Mixer("vit", 8, 2, (2, 2))
    before = mixer(x)
    nn.utils.parametrizations.weight_norm(mixer.q)
    assert torch.allclose(mixer(x), before, atol=1e-6)
    mixer = Mixer("vit", 8, 2, (2, 2))
    prune.l1_unstructured(mixer.q, "weight", 0.5)
    assert mixer(x).isfinite().all() and int((mixer.tensors()["q.weight"] == 0).sum()) == 32
    mixer.key.weight = mixer.value.weight
    mixer(x).sum().backward()
    assert mixer.tensors()["key.weight"] is mixer.tensors()["value.weight"]


@pytest.mark.parametrize("row", ROWS)
def test_a_batch_of_none_and_an_input_that_is_not_contiguous(row: str) -> None:
    mixer = Mixer(MixerSpec.parse(row).at_block(1), 32, 4, (3, 4), prefix=1).eval()
    assert mixer(torch.randn(0, 13, 32)).shape == (0, 13, 32)
    x = torch.randn(32, 13, 2).permute(2, 1, 0)
    assert torch.allclose(mixer(x), mixer(x.contiguous()), atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_rows_compile_whole(row: str) -> None:
    """The default path of every row in inference."""
    torch.compiler.reset()
    mixer, x = Mixer(MixerSpec.parse(row).at_block(1), 32, 4, (3, 4)).eval(), torch.randn(2, 12, 32)
    with torch.no_grad():
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), mixer(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_rows_compile_whole_with_their_gradients(row: str) -> None:
    torch.compiler.reset()
    mixer = Mixer(MixerSpec.parse(row).at_block(1), 32, 4, (3, 4), prefix=1).eval()
    x = torch.randn(2, 13, 32, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(mixer(x).square().sum(), x)
    assert torch.allclose(compiled(x), mixer(x), atol=1e-6) and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["vit", "dwsa", "relu_attention", "layernorm_attention", "swin", "ffn", "iddwconv"])
def test_rows_compile_with_inductor(row: str) -> None:
    torch.compiler.reset()
    mixer = Mixer(MixerSpec.parse(row).at_block(1), 32, 4, (6, 4)).eval()
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        assert torch.allclose(torch.compile(mixer, fullgraph=True)(x), mixer(x), atol=1e-5)


def test_timm_tensors_that_do_not_fit_are_reported_not_scrambled() -> None:
    """fc1 has as many numbers as keys in two heads, in another order: it must not load."""
    two_heads = Mixer("ffn kernel=two_step(2)", 8, 2, (2, 2))
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        two_heads.load_state_dict(Mlp(8, 32).state_dict(), strict=True)
    vit, state = Mixer("vit", 8, 2, (2, 2)), Attention(8, 2, qkv_bias=True).state_dict()
    with pytest.raises(RuntimeError, match=r"qkv\.weight"):
        vit.load_state_dict(state | {"qkv.weight": torch.zeros(2, 8)}, strict=True)
    with pytest.raises(RuntimeError, match="relative_position_bias_table"):
        vit.load_state_dict(state | {"relative_position_bias_table": torch.zeros(1, 1, 1)}, strict=True)


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Mixer("vit", 10, 3, (2, 2)), "invalid dim=10; expected a multiple of 3, the number of heads"),
    (lambda: Mixer("involution", 24, 2, (2, 2)), "invalid dim=24: C/16 is not a whole number"),
    (lambda: Mixer("iddwconv", 24, 2, (2, 2)), "invalid dim=24; expected a multiple of 32, the number of groups"),
    (lambda: Mixer("swin", 8, 2, (2, 2)), "at_block"),
    (lambda: Mixer("dwsa", 8, 2, (2, 2), attn_drop=0.1), "invalid attn_drop=0.1"),
    (lambda: Mixer("vit", 8, 2, (2, 2), proj_drop=1.0), "invalid proj_drop=1.0"),
    (lambda: Mixer("ffn kernel=two_step(norm=l2)", 8, 2, (2, 2)), "a norm or a learned scale needs bank dynamic"),
    (lambda: Mixer("vit", 8, 2, (0, 2)), "invalid grid height=0; expected"),
    (lambda: Mixer("vit", 8, 2, 4), "invalid grid=4; expected"),
    (lambda: Mixer("vit", 8, 2, (4, 4, 4)), "invalid grid=.4, 4, 4.; expected"),
    (lambda: Mixer("vit", 8, True, (2, 2)), "invalid num_heads=True; expected"),
    (lambda: Mixer(None, 8, 2, (2, 2)), "invalid spec=None"),
    (lambda: Mixer("swin support=window(7, alternate, pad=timm)", 8, 2, (10, 10)), "at_block"),
    (lambda: setattr(Mixer("dconv", 8, 2, (2, 2)), "temperature", 0), "invalid temperature=0"),
    (lambda: Mixer("vit", 8, 2, (2, 2), prefix=-1), "invalid prefix=-1; expected"),
    (lambda: Mixer("vit", 8, 2, (2, 2))(torch.randn(1, 5, 8)), r"invalid x of shape \(1, 5, 8\).*2 x 2 positions = 4"),
    (lambda: Mixer("vit", 8, 2, (2, 2))(torch.randn(1, 4, 6)), "C = 8"),
    (lambda: Mixer("vit", 8, 2, (2, 2))(torch.randn(4, 8)), "invalid x of shape"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(build: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "mask", "message"), [
    ("dconv", torch.ones(4, 4, dtype=torch.bool), "expected none, since"),
    ("linformer", torch.ones(4, 4, dtype=torch.bool), "expected none, since"),
    ("dwsa support=self", torch.ones(4, 4, dtype=torch.bool), "support=self; expected none"),
    ("vit", torch.zeros(4, 4, dtype=torch.int), "dtype"),
    ("vit", torch.rand(4, 4), "values other than 0 and -inf"),
    ("vit", torch.ones(4, 5, dtype=torch.bool), "shape"),
    ("vit", torch.ones(1, 2, 4, 4, dtype=torch.bool), "a mask per head"),
])  # fmt: skip
def test_masks_that_cannot_be_honoured_are_refused_by_name(text: str, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(SpecError, match=f"attn_mask.*{message}"):
        Mixer(text, 8, 2, (2, 2))(torch.randn(1, 4, 8), attn_mask=mask)


def test_batchnorm_on_a_single_value_says_so() -> None:
    with pytest.raises(ValueError, match="reduce_norm: invalid batch of 1 x 1 tokens"):
        Mixer("ddwconv", 8, 2, (8, 8))(torch.randn(1, 64, 8))
