"""Folders of transformers and timm, written by these libraries with random weights: what their configuration states is
proved, and never assumed."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_convert_command import run
from tiny_models import drawn

import kernelbank
from kernelbank.errors import InputError
from kernelbank.weights.folder import read_folder

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
Capture = pytest.CaptureFixture[str]
WIDE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
FILE: dict[str, Any] = WIDE | {"intermediate_size": 96}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", FILE | {"hidden_act": "relu", "num_labels": 5}),
    "pooled": ("ViTModel", "ViTConfig", FILE | {"layer_norm_eps": 1e-3}),
    "swin": ("SwinForImageClassification", "SwinConfig", {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 64, "patch_size": 2, "window_size": 4,
        "num_labels": 5}),
    "dinov2": ("Dinov2Model", "Dinov2Config", WIDE | {"mlp_ratio": 2}),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", WIDE | {"mlp_ratio": 2}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", FILE),
    "clip projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", FILE | {"projection_dim": 7}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", FILE),
    "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", FILE | {
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32}),
}  # fmt: skip
"""A class of transformers, its configuration, and arguments that differ from the conventions: 4 heads of 16 channels,
ReLU, another epsilon, images that windows of 4 fill in more than one way."""


def saved(kind: str, folder: Path, **options: Any) -> Any:
    name, config, arguments = KINDS[kind]
    model = drawn(getattr(transformers, name)(getattr(transformers, config)(**arguments)))
    save(model, folder, **options)
    return model


def save(model: Any, folder: Path, **options: Any) -> None:
    with redirect_stderr(io.StringIO()):  # a bar of progress
        model.save_pretrained(folder, **options)


def expected(kind: str, model: Any, images: torch.Tensor) -> torch.Tensor:
    """What a model of transformers computes of the images, written out for each kind."""
    if kind == "mae":  # without masks: the tokens come in a random order, the class token first
        model.vit.config.mask_ratio = 0.0
        return model.vit(images).last_hidden_state[:, 0]
    output = model(images)
    return {
        "vit": lambda: output.logits, "swin": lambda: output.logits, "clip": lambda: output.pooler_output,
        "pooled": lambda: output.last_hidden_state[:, 0], "clip projection": lambda: output.image_embeds,
        "siglip": lambda: output.last_hidden_state,
    }.get(kind, lambda: output.pooler_output)()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_is_proved_by_its_configuration(kind: str, tmp_path: Path, capsys: Capture) -> None:
    model = saved(kind, tmp_path / "theirs")
    code, out, err = run(capsys, tmp_path / "theirs", tmp_path / "ours.safetensors", "--require-proof")
    assert (code, err) == (0, "") and "\nproved: max |difference|" in out and "assumed" not in out
    ours = kernelbank.load(tmp_path / "ours.safetensors").double()
    images = torch.randn(2, 3, *([model.config.image_size] * 2), dtype=torch.float64)
    theirs = expected(kind, model.double(), images)
    torch.testing.assert_close(ours(images), theirs, rtol=1e-10, atol=1e-10)
    dropped = {"pooled": "pooler.dense.weight", "mae": "decoder.decoder_embed.weight", "siglip": "head.probe"}
    dropped |= {"dinov2": "embeddings.mask_token", "dinov2 registers": "embeddings.mask_token"}
    assert dropped[kind] in out if kind in dropped else "dropped" not in out


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 registers", "clip projection", "siglip"])
def test_towers_there_and_back_through_files(kind: str, tmp_path: Path, capsys: Capture) -> None:
    """From transformers to ours and back: transformers loads its own tensors, the bits of which did not change."""
    saved(kind, tmp_path / "theirs")
    dialect = {"clip projection": "huggingface-clip"}.get(kind, "huggingface-" + kind.replace(" ", "-"))
    steps = [("theirs", "ours", "kernelbank"), ("ours.safetensors", "again", dialect)]
    for source, target, to in steps:
        code, _, err = run(capsys, tmp_path / source, tmp_path / f"{target}.safetensors", "--to", to)
        assert (code, err) == (0, "")
    before, after = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "again.safetensors")
    kept = {key for key in before if not key.startswith(("head.", "embeddings.mask_token"))}
    assert after.keys() == kept and all(torch.equal(before[key], after[key]) for key in kept)


def test_the_tower_of_a_whole_clip_is_taken_and_the_rest_is_dropped(tmp_path: Path, capsys: Capture) -> None:
    config = transformers.CLIPConfig(
        vision_config=FILE, projection_dim=7,
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                     "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    )  # fmt: skip
    model = drawn(transformers.CLIPModel(config))
    save(model, tmp_path / "clip")
    code, out, err = run(capsys, tmp_path / "clip", tmp_path / "ours.safetensors", "--require-proof")
    assert (code, err) == (0, "") and "dropped: logit_scale: the loss of CLIP" in out
    ours, images = kernelbank.load(tmp_path / "ours.safetensors"), torch.randn(2, 3, 32, 32)
    pooled = model.vision_model(images).pooler_output
    torch.testing.assert_close(ours(images), model.visual_projection(pooled), rtol=1e-4, atol=1e-4)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    saved("vit", tmp_path / "whole")
    saved("vit", tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = (read_folder(tmp_path / name).state for name in ("whole", "shards"))
    assert whole.keys() == shards.keys() and all(torch.equal(whole[key], shards[key]) for key in whole)


def test_damaged_folders_are_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    saved("vit", folder, max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    document, first = json.loads(index.read_text()), sorted(folder.glob("model-*"))[0]
    places = document["weight_map"]
    for text, match in [
        ("{", "damaged"), ("[]", "expected a JSON object, got list"), ("{}", "invalid weight_map"),
        (json.dumps({"weight_map": {"a": "../x.safetensors"}}), r"invalid shard '\.\./x\.safetensors'"),
        (json.dumps({"weight_map": places | {"more": first.name}}), "more: in the shard or in the index"),
        (json.dumps({"weight_map": {"a": "none.safetensors"}}), "none.safetensors: no such file"),
    ]:  # fmt: skip
        index.write_text(text)
        with pytest.raises(InputError, match=match):
            read_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"a folder without weights; expected model\.safetensors or"):
        read_folder(tmp_path / "empty")


def test_configurations_that_no_trunk_holds_are_refused_by_name(tmp_path: Path, capsys: Capture) -> None:
    saved("dinov2", tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    document = json.loads(config.read_text())
    for change, match in [({"use_swiglu_ffn": True}, "invalid use_swiglu_ffn=True: SwiGLU in the MLPs"),
                          ({"model_type": "convnext"}, "invalid model_type='convnext'; expected vit,"),
                          ({"model_type": 3}, "invalid model_type=3"),
                          ({"hidden_act": "mish"}, "invalid hidden_act='mish'; expected gelu,"),
                          ({"num_attention_heads": 5}, "num_attention_heads=5; expected a divisor of 64"),
                          ({"image_size": "x"}, "image_size"),
                          ({"architecture": "vit_tiny"}, "unknown model 'vit_tiny'")]:  # fmt: skip
        config.write_text(json.dumps(document | change))
        code, out, err = run(capsys, tmp_path / "theirs", tmp_path / "x.safetensors")
        assert (code, out) == (2, "") and match in err and err.count("\n") == 1, err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_of_timm_is_proved_by_its_architecture(tmp_path: Path, capsys: Capture) -> None:
    """QuickGELU has the shapes of GELU: the configuration tells them apart."""
    name, more = "vit_base_patch32_clip_quickgelu_224", {"embed_dim": 64, "depth": 2, "num_heads": 2}
    model = drawn(timm.create_model(name, num_classes=5, **more))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    document = {"architecture": name, "num_classes": 5, "model_args": more}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(document))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        code, out, err = run(capsys, source, tmp_path / "ours.safetensors", "--require-proof")
        assert (code, err) == (0, "") and "activation=quick_gelu" in out
    ours, images = kernelbank.load(tmp_path / "ours.safetensors"), torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), model(images), rtol=1e-4, atol=1e-4)
    for arguments in ({"pretrained": True}, {"checkpoint_path": "x"}, [1]):
        config.write_text(json.dumps(document | {"model_args": arguments}))
        code, _, err = run(capsys, tmp_path, tmp_path / "x.safetensors")
        assert code == 2 and "invalid model_args=" in err
