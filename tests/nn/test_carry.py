"""What carries over when a record or a grid changes: every tensor accounted for, meanings kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from strategies import specs

from kernelbank import Mixer, MixerSpec, SpecError
from kernelbank.atlas import ROWS
from kernelbank.nn.edit.carry import carry
from kernelbank.nn.transform import summed


def verdicts(log: tuple) -> dict[str, str]:
    return {line.name: line.verdict for line in log if line.verdict != "dropped"}


def mixer(text: str, grid: tuple[int, int] = (4, 6), prefix: int = 0, **options: object) -> Mixer:
    torch.manual_seed(0)
    return Mixer(MixerSpec.parse(text).at_block(1), 32, 4, grid, prefix=prefix, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("row", ROWS)
def test_nothing_changes_nothing(row: str) -> None:
    m = mixer(row)
    carried, log = carry(m)
    assert all(line.verdict == "kept" for line in log)
    assert all(new is old for new, old in zip(carried.parameters(), m.parameters(), strict=True))
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    assert torch.equal(carried(x), m(x))


@settings(max_examples=60, deadline=None)
@given(specs(), specs())
def test_every_tensor_of_both_sides_is_accounted_for(old: MixerSpec, new: MixerSpec) -> None:
    m = Mixer(old.at_block(0), 24, 4, (4, 5), prefix=1)
    carried, log = carry(m, new.at_block(0))
    before, after = set(m.tensors()), set(carried.tensors())
    gone = [line.name for line in log if line.verdict == "dropped"]
    there = [line.name for line in log if line.verdict != "dropped"]
    assert sorted(there) == sorted(after)
    assert set(gone) <= before and before - set(gone) == {
        line.name for line in log if line.verdict in ("kept", "transformed")
    }
    assert carried.state_dict().keys() == Mixer(new.at_block(0), 24, 4, (4, 5), prefix=1).state_dict().keys()


@pytest.mark.parametrize(("small", "large"), [
    ("vit", "vit3"), ("dwsa", "dwsa3"), ("condconv_dw size=1", "condconv_dw"),
    ("conv size=1", "conv"), ("involution size=1", "involution"),
])  # fmt: skip
def test_a_larger_kernel_starts_as_the_smaller_one_in_its_centre(small: str, large: str) -> None:
    m, x = mixer(small), torch.randn(2, 24, 32, dtype=torch.float64)
    carried, _ = carry(m, MixerSpec.parse(large))
    assert carried.spec.size > m.spec.size and torch.allclose(carried(x), m(x), atol=1e-12)
    back, _ = carry(carried, m.spec)
    assert all(torch.equal(tensor, m.tensors()[name]) for name, tensor in back.tensors().items())


@pytest.mark.parametrize("row", ["vit_relpos", "dwsa", "identity_attention", "linformer mix=project(5)"])
@pytest.mark.parametrize("grid", [(8, 12), (6, 4), (3, 5)])
def test_a_constant_image_has_the_same_output_on_another_grid(row: str, grid: tuple[int, int]) -> None:
    """Sums over the kernels keep their size: constant tables and matrices, constant tokens, no borders."""
    m = mixer(row)
    with torch.no_grad():
        for name, tensor in m.tensors().items():
            if name.startswith("table") or name in ("E", "F"):
                tensor.fill_(0.3)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    carried, _ = carry(m, grid=grid)
    there = carried(x.expand(1, math.prod(grid), 32))
    assert torch.allclose(there[:, 0], m(x.expand(1, 24, 32))[:, 0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("old", "new", "factor"), [
    ("vit_relpos", "dwsa", 1 / 24), ("dwsa", "vit_relpos", 24), ("dwsa", "dwsa support=window(2, 0)", 24 / 4),
    ("vit_relpos", "vit_relpos activation=relu,count", 1), ("vit_relpos", "vit_relpos activation=identity", 1 / 24),
    ("vit_relpos", "vit_relpos activation=identity,sqrt_count", 24**-0.5),
])  # fmt: skip
def test_p_is_rescaled_where_it_is_summed(old: str, new: str, factor: float) -> None:
    m = mixer(old)
    target = MixerSpec.parse(new)
    carried, log = carry(m, target)
    line = next(line for line in log if line.name == "table.weight" and line.verdict != "dropped")
    assert line.verdict == ("kept" if factor == 1 else "transformed")
    if carried.table.weight.shape == m.table.weight.shape:
        assert torch.allclose(carried.table.weight, m.table.weight * factor)
    assert f"times {factor:.4g}" in line.how or factor == 1


def test_softmax_to_dwsa_divides_p_as_softmax_does_to_first_order() -> None:
    """d/dp of softmax(p) v at p = 0 is (v_j - mean v)/n: p/n summed over the kernels, but for the mean."""
    n = 24
    p = torch.zeros(n, dtype=torch.float64)
    v = torch.randn(n, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda p: torch.softmax(p, 0) @ v, p)
    assert torch.allclose(slope, (v - v.mean()) / n)
    vit, dwsa = MixerSpec.parse("vit_relpos"), MixerSpec.parse("dwsa")
    assert summed(vit, n) / summed(dwsa, n) == 1 / n


def test_prefix_entries_follow_what_they_sum_over() -> None:
    m = mixer("dwsa", prefix=2)
    carried, _ = carry(m, grid=(8, 6))
    assert torch.allclose(carried.table.prefix, m.table.prefix * torch.tensor([0.5, 1, 1]))


def test_what_does_not_fit_is_dropped_with_the_reason_and_drawn_anew() -> None:
    m = mixer("vit_qk_norm")
    carried, log = carry(m, MixerSpec.parse("ddwconv"))
    fates = [(line.name, line.verdict, line.how) for line in log]
    assert ("key.weight", "dropped", "32 x 32 does not become 1568 x 8") in fates
    assert ("key.weight", "initialised", "") in fates
    assert ("k_norm.weight", "dropped", "ddwconv has none") in fates
    assert carried.key.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_frozen_stays_frozen_and_training_and_dtype_stay() -> None:
    m = mixer("vit_relpos").train()
    m.requires_grad_(False)
    carried, _ = carry(m, grid=(8, 8))
    assert not carried.table.weight.requires_grad and carried.training and carried.table.weight.dtype == torch.float64
    m = mixer("dconv")
    m.temperature = 3.0
    assert carry(m, MixerSpec.parse("condconv"))[0].temperature == 3.0


def test_the_same_shape_with_another_meaning_is_not_kept() -> None:
    """36 weights: 4 groups of 9 taps, or 36 channels of one."""
    m = Mixer("involution kernel=grouped(4) size=3", 36, 4, (4, 4))
    _, log = carry(m, MixerSpec.parse("involution kernel=depthwise size=1 support=all"))
    assert ("key.weight", "dropped") in [(line.name, line.verdict) for line in log]


def test_computed_parameters_are_refused() -> None:
    m = mixer("vit")
    torch.nn.utils.parametrizations.weight_norm(m.q)
    with pytest.raises(SpecError, match=r"invalid q, an adapted, hooked or parametrised"):
        carry(m, grid=(8, 8))


def test_attention_dropout_needs_a_map() -> None:
    with pytest.raises(SpecError, match=r"invalid attn_drop=0\.1 for dwsa"):
        carry(mixer("vit_relpos", attn_drop=0.1), MixerSpec.parse("dwsa"))


@pytest.mark.parametrize("row", ["vit_relpos", "dwsa", "linformer mix=project(3)", "swin support=window(3, alternate)"])
def test_a_forward_on_another_grid_is_the_carried_mixer(row: str) -> None:
    m = mixer(row, dynamic_grid=True, prefix=1)
    x = torch.randn(2, 1 + 35, 32, dtype=torch.float64, requires_grad=True)
    y = m(x, (5, 7))
    assert torch.allclose(y, carry(m, grid=(5, 7))[0](x), atol=1e-12)
    y.sum().backward()
    assert all(p.grad is not None for p in m.parameters())
    small = (2, 2) if "swin" in row else (5, 7)
    with pytest.raises(SpecError, match="dynamic_grid=True"):
        mixer(row, prefix=1)(x[:, : 1 + math.prod(small)], small)
