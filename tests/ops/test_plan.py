"""Forced paths: what they are called, what they refuse, and that they end with their block."""

from __future__ import annotations

import pytest
import torch

from kernelbank import Mixer, MixerSpec, mix, use_path
from kernelbank.ops.plan import PathError, plan


def test_an_unknown_path_is_named_with_the_nearest() -> None:
    with pytest.raises(PathError, match="unknown path 'convs'; did you mean 'conv'"), use_path("convs"):
        pass


def test_a_path_that_cannot_serve_is_an_error_with_the_paths_that_can() -> None:
    mixer = Mixer("dwsa", 8, 2, (2, 2))
    with use_path("conv"), pytest.raises(PathError, match="paths that can: vectorised, reference"):
        mixer(torch.randn(1, 4, 8))
    mixer(torch.randn(1, 4, 8))


def test_the_reference_refuses_dropout_in_training() -> None:
    mixer = Mixer("vit", 8, 2, (2, 2), attn_drop=0.5)
    with use_path("reference"), pytest.raises(PathError, match="dropout"):
        mixer(torch.randn(1, 4, 8))


def test_a_plan_says_why() -> None:
    chosen = plan(MixerSpec.parse("vit"), (1, 4, 8), torch.device("cpu"), torch.float32, False)
    assert chosen.path == "vectorised" and chosen.reason


def test_mix_is_the_module_without_state() -> None:
    mixer = Mixer("swin support=window(2, shift=1)", 8, 2, (3, 3), prefix=1)
    x = torch.randn(2, 10, 8)
    assert torch.equal(mix(x, mixer.tensors(), mixer.spec, 2, (3, 3), prefix=1), mixer(x))
