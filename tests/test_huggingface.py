"""Activations as the attention of Transformers: softmax equals the model's own, others equal a conversion with the
mixers replaced, and a model that does not call the interface is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import drawn

import kernelbank
from kernelbank.cli import main
from kernelbank.errors import InputError
from kernelbank.huggingface import PIPELINES, split_mask

transformers = pytest.importorskip("transformers", minversion="5", reason="the extra hf is not installed")

VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128, "image_size": 32,
       "patch_size": 8}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
CLASSES: dict[str, dict[str, Any]] = {
    "ViT": VIT, "DeiT": VIT, "Dinov2": VIT, "Dinov2WithRegisters": VIT, "DINOv3ViT": VIT, "IJepa": VIT,
    "Beit": VIT | {"use_relative_position_bias": True}, "CLIPVision": VIT, "SiglipVision": VIT, "Swin": SWIN,
}  # fmt: skip
UNABLE = {"Swinv2": SWIN, "PvtV2": {}, "Hiera": {}}


def model_of(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    return drawn(model, std=0.1).double()


def output(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(images).last_hidden_state
    return result


@pytest.mark.parametrize("name", CLASSES)
def test_softmax_is_the_attention_of_the_model(name: str) -> None:
    model, images = model_of(name, CLASSES[name]), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.set_attn_implementation("eager")
    own = output(model, images)
    assert kernelbank.set_attention(model, "softmax") is model
    assert torch.allclose(output(model, images), own, atol=1e-6)  # some classes compute softmax in float32
    kernelbank.set_attention(model, "relu,count")
    assert (output(model, images) - own).abs().max() > 1e-3
    kernelbank.set_attention(model.float().train(), "layernorm,count")
    model(images.float()).last_hidden_state.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", UNABLE)
def test_a_model_that_does_not_call_the_interface_is_an_error(name: str) -> None:
    model = model_of(name, UNABLE[name])
    with pytest.raises(InputError, match=f"the attention of {name}Model does not go through"):
        kernelbank.set_attention(model, "relu,count")


def test_it_equals_a_conversion_with_the_mixers_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = drawn(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)), std=0.1)
    theirs.save_pretrained(tmp_path / "vit")
    assert main(["convert", str(tmp_path / "vit"), str(tmp_path / "vit.safetensors")]) == 0
    ours, images = kernelbank.load(tmp_path / "vit.safetensors"), torch.randn(2, 3, 32, 32)
    kernelbank.replace_mixers(ours, "activation=relu,count")
    kernelbank.set_attention(theirs, "relu,count")
    with torch.no_grad():
        assert torch.allclose(theirs(images).logits, ours.eval()(images), atol=1e-5)


def test_names_for_attn_implementation() -> None:
    assert kernelbank.register_attention() == tuple(f"kernelbank:{text}" for text in PIPELINES)
    (name,) = kernelbank.register_attention("exp,l1")
    assert name == "kernelbank:softmax"
    config = transformers.ViTConfig(**VIT)
    model = transformers.AutoModel.from_config(config, attn_implementation="kernelbank:relu,count")
    assert model.config._attn_implementation == "kernelbank:relu,count"
    with pytest.raises(kernelbank.SpecError, match="batchnorm"):
        kernelbank.register_attention("batchnorm")
    with pytest.raises(InputError, match="a Linear; expected a PreTrainedModel"):
        kernelbank.set_attention(torch.nn.Linear(2, 2), "softmax")


def test_a_position_bias_is_added_and_what_would_be_dropped_is_an_error() -> None:
    kernelbank.register_attention("softmax")
    attention = transformers.AttentionInterface()["kernelbank:softmax"]
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    b, mask = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    expected = torch.softmax((q @ q.mT / 2 + b).masked_fill(~mask, -torch.inf), -1) @ q
    module = torch.nn.Linear(1, 1)
    assert torch.allclose(attention(module, q, q, q, mask, position_bias=b)[0].transpose(1, 2), expected)
    causal = attention(module, q, q, q, None, position_bias=b, is_causal=True)[0]
    assert torch.allclose(causal.transpose(1, 2), expected)
    with pytest.raises(InputError, match="invalid softcap of Linear"):
        attention(module, q, q, q, mask, softcap=30.0)


def test_masks_are_visibility_and_a_bias() -> None:
    low = torch.finfo(torch.float32).min
    bias, visible = split_mask(torch.tensor([[0.5, low], [-torch.inf, -2.0]]))
    assert bias is not None and visible is not None
    assert bias.tolist() == [[0.5, 0.0], [0.0, -2.0]]
    assert visible.tolist() == [[True, False], [False, True]]
    assert split_mask(None) == (None, None)
    boolean = torch.ones(1, 1, dtype=torch.bool)
    assert split_mask(boolean)[1] is boolean
