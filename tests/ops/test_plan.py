"""Forced paths: what they are called, what they do not support, and that they end with their block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernelbank import Mixer, MixerSpec, mix, use_path
from kernelbank.ops import machine
from kernelbank.ops.context import Call, Context
from kernelbank.ops.expansion import LARGEST
from kernelbank.ops.geometry import geometry
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import SLOTS, toeplitz
from kernelbank.ops.paths.path import PathError
from kernelbank.ops.plan import Plan, plan, verdicts


def test_an_unknown_path_is_named_with_the_nearest() -> None:
    with pytest.raises(PathError, match="unknown path 'convs'; did you mean 'conv'"), use_path("convs"):
        pass


def test_a_path_that_cannot_serve_is_an_error_with_the_paths_that_can() -> None:
    mixer = Mixer("dwsa", 8, 2, (2, 2))
    with use_path("sdpa"), pytest.raises(PathError, match="paths that do: vectorised, conv, reference"):
        mixer(torch.randn(1, 4, 8))
    mixer(torch.randn(1, 4, 8))


def test_the_reference_refuses_dropout_in_training() -> None:
    mixer = Mixer("vit", 8, 2, (2, 2), attn_drop=0.5)
    with use_path("reference"), pytest.raises(PathError, match="dropout"):
        mixer(torch.randn(1, 4, 8))


CPU = Machine("cpu", 2, True, True, {"linear": (1.0, 1.0), "conv1x1": (0.9, 2.0), "mkldnn": (1.1, 2.1)})


def chosen(text: str, grid: tuple[int, int], dim: int = 384, heads: int = 6, m: Machine = CPU, **call: Any) -> Plan:
    spec = MixerSpec.parse(text).at_block(1)
    tokens = call.pop("batch", 8) * grid[0] * grid[1]
    return plan(Context(spec, dim, heads, geometry(spec, grid, 0)), Call(tokens, **call), m)


@pytest.mark.parametrize(
    ("text", "grid", "mixer", "position"),
    [
        ("vit", (14, 14), "sdpa", None),
        ("ffn", (14, 14), "bottleneck", None),
        ("relu_attention", (14, 14), "pointwise", None),
        ("relu_attention", (28, 28), "pointwise_onednn", None),
        ("layernorm_attention", (12, 12), "vectorised", None),
        ("layernorm_attention", (14, 14), "moments", "dense"),
        ("layernorm_attention", (56, 56), "moments", "hybrid"),
        ("identity_attention", (14, 14), "associated", "dense"),
        ("identity_attention", (7, 7), "vectorised", None),
        ("dwsa", (14, 14), "vectorised", "dense"),
        ("dwsa", (20, 20), "vectorised", "hybrid"),
        ("dwsa", (64, 64), "vectorised", "hybrid"),
        ("dwsa", (96, 96), "vectorised", "hybrid_fft"),
        ("dwsa", (128, 128), "vectorised", "fourier"),
        ("dwsa_window", (56, 56), "windows", None),
        ("involution", (14, 14), "shifts", None),
    ],
)
def test_a_plan_by_spec_and_grid(text: str, grid: tuple[int, int], mixer: str, position: str | None) -> None:
    made = chosen(text, grid)
    assert (made.mixer.path, made.position and made.position.path) == (mixer, position)
    assert all(choice.reason for choice in (made.mixer, made.linear))


def test_the_linear_form_follows_the_probe_the_gradient_and_the_dtype() -> None:
    assert chosen("vit", (14, 14)).linear.path == "mkldnn"
    assert chosen("vit", (14, 14), grad=True).linear.path == "conv1x1"
    assert chosen("vit", (14, 14), grad=True, batch=1).linear.path == "linear"  # few tokens: 0.9x
    assert chosen("vit", (14, 14), dtype=torch.bfloat16).linear.path == "linear"
    assert chosen("vit", (14, 14), m=Machine("cpu", 1, reason="one core")).linear.path == "linear"
    assert "2.10x" in chosen("vit", (14, 14)).linear.reason
    half = replace(CPU, dtype=torch.bfloat16)
    assert chosen("vit", (14, 14), dtype=torch.bfloat16, m=half).linear.path == "mkldnn"
    assert chosen("vit", (14, 14), m=half).linear.path == "linear"


def test_a_probe_in_bfloat16_needs_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_probed", {})
    monkeypatch.setattr(machine, "probe", lambda device, dtype: Machine(device, reason="a test", dtype=dtype))
    for has in (False, True):
        monkeypatch.setattr(machine, "_has_bfloat16", lambda has=has: has)
        found = [machine.machine(dtype=dtype).dtype for dtype in (torch.float64, torch.float16, torch.bfloat16)]
        assert found == [torch.float32, torch.float32, torch.bfloat16 if has else torch.float32]


def test_the_fused_form_may_be_a_little_slower() -> None:
    def taken(conv1x1: float) -> str:
        gains = {"linear": (1.0, 1.0), "conv1x1": (conv1x1, conv1x1), "mkldnn": (2.0, 2.0)}
        return chosen("ffn", (14, 14), m=Machine("cpu", 2, True, True, gains)).linear.path

    assert (taken(2.2), taken(2.4)) == ("mkldnn", "conv1x1")


def test_the_positional_operator_follows_gradient_and_dtype() -> None:
    calls: list[dict[str, Any]] = [{}, {"grad": True}, {"dtype": torch.bfloat16}]
    small, large = ([chosen("dwsa", grid, **call).position for call in calls] for grid in ((20, 20), (96, 96)))
    assert [choice and choice.path for choice in small] == ["hybrid", "dense", "dense"]
    assert [choice and choice.path for choice in large] == ["hybrid_fft", "fourier", "hybrid_fft"]


@pytest.mark.parametrize(("side", "heads", "path"), [(111, 6, "hybrid_fft"), (139, 3, "fourier"), (140, 3, "fourier")])
def test_a_spectrum_that_is_taken_is_kept(side: int, heads: int, path: str) -> None:
    """The plan counts the bytes of the spectrum itself; 2 side - 1 is often no length that transforms are fast on."""
    choice = chosen("dwsa", (side, side), heads=heads).position
    assert choice is not None and choice.path == path
    spectrum = toeplitz._fft_spectrum(torch.zeros(1, 2 * side - 1, 2 * side - 1), (side, side))
    assert (heads * spectrum.numel() * spectrum.element_size() <= LARGEST) == (path == "hybrid_fft")


def test_a_plan_is_pure() -> None:
    assert chosen("dwsa", (14, 14)) == chosen("dwsa", (14, 14))


def test_every_path_has_a_verdict_with_a_reason() -> None:
    spec = MixerSpec.parse("dwsa")
    said = verdicts(Context(spec, 384, 6, geometry(spec, (14, 14), 0)), Call(grad=True), CPU)
    assert [v.path for v in said] == list(SLOTS) and all(v.reason for v in said)
    assert [v.path for v in said if v.verdict == "chosen"] == ["vectorised", "linear", "dense"]
    assert {v.path: v.reason for v in said}["mkldnn"] == "it has no derivative"


def test_two_paths_of_one_part_cannot_be_forced_together() -> None:
    with pytest.raises(PathError, match="the same part"), use_path("sdpa", "conv"):
        pass


def test_a_forced_positional_operator_needs_a_path_that_has_one() -> None:
    relative, affine = Mixer("vit_relpos", 8, 2, (2, 2)), Mixer("identity_attention", 8, 2, (2, 2))
    with use_path("hybrid"), pytest.raises(PathError, match="non-linearity"):
        relative(torch.randn(1, 4, 8))
    with use_path("hybrid"):
        affine(torch.randn(1, 4, 8))
    with (
        use_path("hybrid"),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(PathError, match="moments: sums of sq"),
    ):
        Mixer("layernorm_attention", 8, 2, (2, 2))(torch.randn(1, 4, 8))
    with use_path("vectorised", "hybrid"), pytest.raises(PathError, match="no positional operator"):
        affine(torch.randn(1, 4, 8))


def test_mix_is_the_module_without_state() -> None:
    mixer = Mixer("swin support=window(2, shift=1)", 8, 2, (3, 3), prefix=1)
    x = torch.randn(2, 10, 8)
    assert torch.equal(mix(x, mixer.tensors(), mixer.spec, 2, (3, 3), prefix=1), mixer(x))
