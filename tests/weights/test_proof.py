"""What a proof means: nothing about the model was assumed. The cases that proved themselves before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tiny_models import PLAIN, drawn

from kernelbank import cli
from kernelbank.weights.alike import alike, settle
from kernelbank.weights.infer import Inferred, infer

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["convert", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def unclaimed(capsys: Capture, path: Path, *argv: object) -> str:
    """The transcript of a file whose model is a guess: it says so, its JSON too, and --require-proof refuses it."""
    target = path.with_name("target.safetensors")
    code, out, _ = run(capsys, path, target, *argv)
    assert code == 0 and not any(line.startswith("proved") for line in out.splitlines()), out
    assert "\nassumed: " in out
    assert "compared: keys and shapes proved; outputs equal if the assumptions hold" in out
    target.unlink()
    code, _, err = run(capsys, path, target, *argv, "--require-proof")
    assert code == 2 and "not proved: assumed: " in err and not target.exists()
    code, document, _ = run(capsys, path, target, *argv, "--json")
    assert code == 0 and json.loads(document)["proved"] is False
    return out


@pytest.mark.parametrize("name", [
    "vit_base_patch16_rpn_224", "vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_siglip_gap_224",
    "vit_base_patch32_clip_224", "vit_base_patch16_224",
])  # fmt: skip
def test_timms_models_of_other_sizes_are_not_proved(name: str, tmp_path: Path, capsys: Capture) -> None:
    """Norms after the branches, QuickGELU, tanh-GELU and another epsilon have the keys and shapes of our guess."""
    model = drawn(timm.create_model(name, depth=2, embed_dim=96, num_heads=6, img_size=64, num_classes=5))
    out = unclaimed(capsys, saved(tmp_path / "x.safetensors", model.state_dict()))
    assert "norm eps 1e-06, GELU, norms before the branches, attention scale d^-1/2, 1 heads of 96 channels" in out


@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers_are_not_proved(tmp_path: Path, capsys: Capture) -> None:
    """Another activation, and a Swin for 64 pixels whose shapes are those for 32."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        hidden_act="relu",
    ))  # fmt: skip
    swin = transformers.SwinForImageClassification(transformers.SwinConfig(
        embed_dim=16, depths=[2, 2, 1, 1], num_heads=[2, 4, 4, 4], image_size=64, patch_size=2, window_size=2,
    ))  # fmt: skip
    assert "GELU" in unclaimed(capsys, saved(tmp_path / "vit.safetensors", vit.state_dict()))
    out = unclaimed(capsys, saved(tmp_path / "swin.safetensors", swin.state_dict()))
    assert "images of 32 x 32" in out
    out = unclaimed(capsys, tmp_path / "swin.safetensors", "--img-size", 64, 64)
    assert "images of 64 x 64" in out and "GELU" in out


def state_of(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state: dict[str, torch.Tensor] = timm.create_model(name).state_dict()
    return state


@pytest.mark.parametrize(("name", "others"), [
    ("vit_base_patch32_clip_quickgelu_224", "vit_base_patch32_clip_224, vit_base_patch32_clip_256"),
    ("vit_base_patch16_siglip_gap_224", "vit_base_patch16_gap_224; vit_base_patch16_siglip_gap_224"),
])  # fmt: skip
def test_architectures_of_the_same_shapes_are_named(name: str, others: str) -> None:
    state = state_of(name)
    with pytest.raises(ValueError, match="compute different outputs") as refusal:
        settle("vit", state, infer("vit", state))
    assert (
        others in str(refusal.value) and name in str(refusal.value) and "state one with --model" in str(refusal.value)
    )


def test_the_only_architecture_of_the_shapes_is_one_that_we_cannot_hold() -> None:
    state = state_of("vit_base_patch16_rpn_224")
    with pytest.raises(ValueError, match=r"timm's vit_base_patch16_rpn_224: blocks.0: invalid block_fn=ResPost"):
        settle("vit", state, infer("vit", state))


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit3_small_patch16_224"])
def test_what_timm_has_confirms_the_conventions(name: str) -> None:
    state = state_of(name)
    inferred = infer("vit", state)
    assert settle("vit", state, inferred) is inferred
    (names,) = alike("vit", state, inferred.spec).values()
    assert name in names


def test_the_only_architecture_of_timm_goes_before_the_conventions() -> None:
    """Two heads of 32 channels, where the convention is one of 64. It stays an assumption."""
    state = state_of("test_vit")
    settled = settle("vit", state, infer("vit", state))
    assert isinstance(settled, Inferred) and settled.spec.trunk.heads == (2,)
    assert settled.assumed == ("timm's test_vit, its only architecture with these keys and shapes",)


def test_models_of_swin() -> None:
    state = state_of("swin_tiny_patch4_window7_224")
    inferred = infer("swin", state)
    assert settle("swin", state, inferred) is inferred
    (names,) = alike("swin", state, inferred.spec).values()
    assert names == ["swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize(("model", "named"), [
    (VisionTransformer, PLAIN), (SwinTransformer, {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1),
                                                   "num_heads": (1, 2), "window_size": 4}),
])  # fmt: skip
def test_own_models_have_none(model: type, named: dict[str, Any]) -> None:
    state = model(**named).state_dict()
    family = "vit" if model is VisionTransformer else "swin"
    assert alike(family, state, infer(family, state).spec) == {}
