"""Files as training scripts leave them: one conversion for each kind, its outputs, and what the transcript says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_convert_command import run
from timm.models.vision_transformer import VisionTransformer
from tiny_models import PLAIN, drawn
from torch import nn

import kernelbank
from kernelbank.errors import InputError
from kernelbank.weights.convert import convert_state, read

Capture = pytest.CaptureFixture[str]
State = dict[str, Any]
DINO: State = {"mlp.0.weight": torch.ones(4, 64), "last_layer.weight_g": torch.ones(4, 1)}
DECODER: State = {"decoder_embed.weight": torch.ones(8, 64), "decoder_blocks.0.norm1.weight": torch.ones(8)}
LOSS: State = {"criterion.weight": torch.ones(5)}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def checkpoint(kind: str, state: State, other: State) -> tuple[State, str]:
    """What a training script writes of a model with `state`, with `other` weights beside it where there are two, and a
    line of the transcript."""
    args = argparse.Namespace(model="vit", output=Path("out"), lr=0.1)
    return {
        "timm": ({"arch": "vit", "args": args, "epoch": 3, "state_dict": other, "state_dict_ema": state,
                  "optimizer": {"param_groups": [{"lr": 0.1}]}, "metric": 81.2},
                 "taken: the weights under state_dict_ema, not state_dict (--entry takes another)"),
        "deit": ({"model": other, "model_ema": state, "args": args}, "taken: the weights under model_ema, not model"),
        "lightning": ({"state_dict": under("model._orig_mod.", state) | LOSS, "hyper_parameters": {"lr": 0.1}},
                      "dropped: criterion.weight: the loss of the training script"),
        "dino": ({"student": under("module.backbone.", other),
                  "teacher": under("backbone.", state) | under("head.", DINO), "args": args},
                 "dropped: head.last_layer.weight_g: the projection head of DINO"),
        "dinov2": ({"teacher": under("module.backbone.", state) | under("module.dino_head.", DINO)},
                   "prefix: backbone. removed from every key"),
        "mae": ({"model": state | DECODER | {"mask_token": torch.ones(1, 1, 8)}, "args": args},
                "dropped: decoder_blocks.0.norm1.weight: the decoder of masked pre-training"),
        "compiled": ({"model": under("_orig_mod.module.", state)}, "prefix: _orig_mod.module. removed from every key"),
        "open_clip": (under("visual.trunk.", state) | {"text.embedding.weight": torch.ones(2, 2),
                                                       "logit_scale": torch.ones(())},
                      "prefix: visual.trunk. removed from every key"),
    }[kind]  # fmt: skip


KINDS = ("timm", "deit", "lightning", "dino", "dinov2", "mae", "compiled", "open_clip")


@pytest.mark.parametrize("kind", KINDS)
def test_training_checkpoints_are_read_and_said(kind: str, tmp_path: Path, capsys: Capture) -> None:
    headless = PLAIN | {"num_classes": 0}
    model, other = drawn(VisionTransformer(**headless)), VisionTransformer(**headless)
    content, said = checkpoint(kind, model.state_dict(), other.state_dict())
    torch.save(content, tmp_path / "checkpoint.pth")
    code, out, err = run(capsys, tmp_path / "checkpoint.pth", tmp_path / "ours.safetensors")
    assert (code, err) == (0, "") and any(line.startswith(said) for line in out.splitlines()), out
    images = torch.randn(2, 3, 32, 32)
    ours = kernelbank.load(tmp_path / "ours.safetensors")
    torch.testing.assert_close(ours(images), model(images), rtol=1e-5, atol=1e-5)


def test_an_entry_is_taken_on_request(tmp_path: Path, capsys: Capture) -> None:
    model, averaged = drawn(VisionTransformer(**PLAIN)), VisionTransformer(**PLAIN)
    content, _ = checkpoint("timm", averaged.state_dict(), model.state_dict())
    torch.save(content, tmp_path / "checkpoint.pth")
    target, images = tmp_path / "ours.safetensors", torch.randn(2, 3, 32, 32)
    code, out, _ = run(capsys, tmp_path / "checkpoint.pth", target, "--entry", "state_dict")
    assert code == 0 and "taken: the weights under state_dict, not state_dict_ema" in out
    torch.testing.assert_close(kernelbank.load(target)(images), model(images), rtol=1e-5, atol=1e-5)
    code, _, err = run(capsys, tmp_path / "checkpoint.pth", target, "--entry", "optimizer.state")
    assert code == 2 and "no entry 'optimizer.state'" in err and "state_dict_ema, state_dict" in err
    code, _, err = run(capsys, "vit_tiny_patch16_224", target, "--entry", "model")
    assert code == 2 and "invalid --entry=model; expected a file" in err


def facebook_dinov2(model: Any) -> State:
    """The keys of facebook's DINOv2 with registers, written by hand: the registers have no position embedding."""
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    places = state["pos_embed"]
    state["pos_embed"] = torch.cat((places[:, :1], places[:, 3:]), 1)
    return state | {"mask_token": torch.zeros(1, 64)}


def test_facebooks_dinov2_with_registers(tmp_path: Path, capsys: Capture) -> None:
    """timm's own conversion of it, whose class token has the position embedding added, computes the same."""
    headless = PLAIN | {"num_classes": 0}
    model = drawn(VisionTransformer(**headless, init_values=0.1, reg_tokens=2))
    with torch.no_grad():
        model.pos_embed[:, 1:3] = 0
    theirs = facebook_dinov2(model)
    save_file(theirs, tmp_path / "dinov2.safetensors")
    code, out, err = run(capsys, tmp_path / "dinov2.safetensors", tmp_path / "ours.safetensors")
    assert (code, err) == (0, "") and out.startswith("read: facebook-registers, vit")
    assert "dropped: mask_token: the token of masked patches" in out
    timms = VisionTransformer(**headless, init_values=0.1, reg_tokens=2, no_embed_class=True)
    timms.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(theirs, timms))
    ours, images = kernelbank.load(tmp_path / "ours.safetensors"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), timms.eval()(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images), model(images), rtol=1e-5, atol=1e-5)
    back = convert_state(convert_state(theirs, "timm"), "facebook-registers")
    assert back.keys() == theirs.keys() - {"mask_token"} and all(torch.equal(back[key], theirs[key]) for key in back)
    with pytest.raises(InputError, match="position embeddings for the registers; expected zeros"):
        convert_state(drawn(VisionTransformer(**PLAIN, reg_tokens=2)).state_dict(), "facebook-registers")


def test_torchvisions_vit_comes_over_whole() -> None:
    from torchvision.models import VisionTransformer as Theirs

    theirs = drawn(Theirs(32, 8, 2, 1, 64, 128, num_classes=5))
    source = read(theirs.state_dict())
    assert source.dialect.name == "torchvision" and source.spec.trunk.norm_eps == theirs.encoder.ln.eps
    model = VisionTransformer(**PLAIN, mlp_ratio=2)
    model.load_state_dict(convert_state(theirs.state_dict(), "timm"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), theirs(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="torchvision: invalid global_pool='avg'; expected 'token'"):
        convert_state(VisionTransformer(**PLAIN, global_pool="avg").state_dict(), "torchvision")


class Head(nn.Module):
    """A linear head on the class token and the mean of the patches, as DINOv2's classifiers have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 5)


@pytest.mark.parametrize(("more", "match"), [
    ({"blocks.0.mlp.w12.weight": torch.ones(2)}, r"blocks\.0\.mlp\.w12\.weight: .* SwiGLU in the MLPs"),
    ({"dist_token": torch.ones(1, 1, 64)}, "dist_token: our trunks do not have the distillation token"),
    ({"attn_pool.latent": torch.ones(1)}, r"attn_pool\.latent: .* attention pooling"),
    ({"blocks.0.attn.q_bias": torch.ones(1)}, r"blocks\.0\.attn\.q_bias: .* biases of BEiT"),
    ({"rope.periods": torch.ones(1)}, r"rope\.periods: .* rotary position embeddings"),
    (Head().state_dict(), "wrong shape: head.weight"),
])  # fmt: skip
def test_what_a_trunk_does_not_have_is_refused_by_name(more: State, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read(VisionTransformer(**PLAIN).state_dict() | more)
