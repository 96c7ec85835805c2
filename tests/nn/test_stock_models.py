"""Adapters for timm's models: outputs and gradients in float64 equal those of the stock model, other mixers run and
learn, and what no spec describes is refused or left with its reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, LayerNorm2d, RotaryEmbeddingCat
from timm.models.davit import DaVit
from timm.models.metaformer import Attention, MetaFormer, SepConv
from timm.models.tiny_vit import TinyVit
from timm.models.twins import Twins
from torch import Tensor, nn

import kernelbank
from kernelbank import SpecError, replace_mixers
from kernelbank.analysis.coverage import candidates, cover
from kernelbank.errors import InputError
from kernelbank.nn.edit.stock import ADAPTERS, SeatedMixer, block_attentions

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 3}
SWIN_V2 = {"embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 3}
STAGES = {"depths": (1, 1, 1, 1), "num_classes": 3}
Case = tuple[str | Callable[..., nn.Module], dict[str, Any], tuple[int, int]]

CASES: dict[str, Case] = {
    "ViT, QuickGELU": ("vit_base_patch32_clip_quickgelu_224", TINY | {"img_size": 64}, (64, 64)),
    "ViT, parallel": ("vit_small_patch16_18x2_224", TINY | {"img_size": 64}, (64, 64)),
    "SigLIP": ("vit_base_patch16_siglip_224", TINY | {"img_size": 64}, (64, 64)),
    "AIMv2": ("aimv2_large_patch14_224", TINY | {"img_size": 56}, (56, 56)),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", TINY | {"img_size": 64}, (64, 64)),
    "EVA-02": ("eva02_tiny_patch14_224", TINY | {"img_size": (42, 56)}, (42, 56)),
    "EVA-02, other images": ("eva02_tiny_patch14_224", TINY | {"img_size": 56, "dynamic_img_size": True}, (42, 70)),
    "DINOv3": ("vit_small_patch16_dinov3", TINY | {"img_size": 64}, (64, 96)),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", TINY | {"img_size": 64}, (64, 64)),
    "vit_rope": ("vit_small_patch16_rope_ape_224", TINY | {"img_size": 64}, (64, 64)),
    "Qwen3-VL": ("qwen3_vit_88m", {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}, (64, 64)),
    "DeepSeek": ("deepseek_vit_412m", {"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 2}, (56, 56)),
    "NaFlexViT": ("naflexvit_base_patch16_gap", TINY, (48, 80)),
    "BEiT": ("beit_base_patch16_224", TINY | {"img_size": 64}, (64, 64)),
    "BEiT, shared": ("beit_base_patch16_224", TINY | {"img_size": 64, "use_shared_rel_pos_bias": True}, (64, 64)),
    "Swin V2": ("swinv2_tiny_window8_256", SWIN_V2 | {"img_size": 64, "window_size": 4}, (64, 64)),
    "Swin V2, other images": ("swinv2_tiny_window8_256", SWIN_V2 | {"img_size": (96, 64), "window_size": 5}, (96, 64)),
    "ViT, qk norm": ("vit_base_patch16_224", TINY | {"img_size": 64, "qk_norm": True}, (64, 64)),
    "ViT, RMS norms": ("vit_base_patch16_224", TINY | {"img_size": 32, "qk_norm": True, "norm_layer": "rmsnorm"},
                       (32, 32)),
    "vit_relpos": ("vit_relpos_small_patch16_224", TINY | {"img_size": (48, 64)}, (48, 64)),
    "vit_relpos, class token": ("vit_relpos_base_patch16_cls_224", TINY | {"img_size": 64}, (64, 64)),
    "vit_srelpos": ("vit_srelpos_small_patch16_224", TINY | {"img_size": 64}, (64, 64)),
    "MaxViT": ("test_maxvit", {"num_classes": 3}, (160, 160)),
    "CoAtNet": ("test_coatnet", {"num_classes": 3}, (160, 160)),
    "TinyViT": (TinyVit, STAGES | {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)}, (160, 192)),
    "DaViT": (DaVit, STAGES | {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}, (72, 60)),
    "Twins": (Twins, STAGES | {"embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "wss": (7, 7, 7, 7)},
              (160, 192)),
    "CAFormer": (MetaFormer, STAGES | {"dims": (16, 16, 32, 64), "token_mixers": [SepConv] * 2 + [Attention] * 2,
                 "norm_layers": [LayerNorm2d] * 2 + [LayerNorm] * 2}, (96, 64)),
    "PoolFormer": (MetaFormer, STAGES | {"dims": (16, 16, 32, 64)}, (96, 64)),
    "FastViT": ("fastvit_sa12", {"layers": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 64), "num_classes": 3}, (64, 96)),
    "Visformer": ("visformer_tiny", {"depth": (1, 1, 1), "num_classes": 3}, (224, 224)),
    "ConvNeXt": ("test_convnext", {"num_classes": 3}, (64, 96)),
    "ConvNeXt V2": ("test_convnext2", {"num_classes": 3}, (64, 64)),
    "Hiera": ("hiera_tiny_224", {"stages": (1, 2, 2, 1), "embed_dim": 24, "num_classes": 3}, (224, 224)),
}  # fmt: skip


def stock(case: str) -> tuple[Any, Tensor]:
    """A model with weights far from timm's small ones, and images for it."""
    name, options, size = CASES[case]
    torch.manual_seed(0)
    model = (timm.create_model(name, **options) if isinstance(name, str) else name(**options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(2, 3, *size, dtype=torch.float64)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the gradient of their squares by the images; those by the parameters are in `grad`."""
    model.zero_grad(set_to_none=True)
    x = images.clone().requires_grad_()
    outputs = model(x)
    outputs.square().sum().backward()
    assert x.grad is not None
    return outputs.detach(), x.grad


UNTIED = {
    "Swin V2",
    "Swin V2, other images",
    "BEiT, shared",
    "vit_srelpos",
    "TinyViT",
    "vit_relpos",
    "vit_relpos, class token",
}
"""Models whose table is computed, or shared by blocks or signs: its gradient is not that of the mixers' tables."""
SINGLE = {"EVA-02", "EVA-02, other images", "DINOv3", "Perception Encoder", "vit_rope", "Qwen3-VL", "DeepSeek"}
"""Models in which timm computes the angles of a rotation in float32."""


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_stock_model(case: str) -> None:
    model, images = stock(case)
    twin = copy.deepcopy(model)
    before, by_images = gradients(model, images)
    scale, tolerance = before.abs().max(), 1e-5 if case in SINGLE else 1e-9
    for parameter, source in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(parameter) if source.grad is None else source.grad
    expected = {one.name: one for one in block_attentions(twin)}  # reading is linear: the mixers of the gradients
    assert replace_mixers(model, "bias=True" if case != "PoolFormer" else "size=3") is model
    after, again = gradients(model, images)
    assert (after - before).abs().max() <= tolerance * scale
    assert (again - by_images).abs().max() <= tolerance * by_images.abs().max()
    compared = 0
    for one in block_attentions(model):
        theirs = expected[one.name]
        for name, tensor in one.mixer.tensors().items():
            if (
                name in theirs.lacking
                or name not in theirs.mixer.tensors()
                or (case in UNTIED and name.startswith("table"))
            ):
                continue
            want = theirs.mixer.tensors()[name]
            assert (tensor.grad - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-3), (one.name, name)
            compared += 1
    assert compared or case == "PoolFormer"
    assert isinstance(model.get_submodule(one.name), kernelbank.Mixer)


TEXTS = {"relu": "activation=relu,count position=none", "dwsa": "dwsa", "neighborhood": "nat support=neighborhood(3)"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("case", CASES)
def test_other_mixers_run_and_learn(case: str, text: str) -> None:
    model, images = stock(case)
    model = model.float()
    if case in ("PoolFormer", "ConvNeXt", "ConvNeXt V2") and "=" in text.split(maxsplit=1)[0]:
        text = f"vit {text}"
    replace_mixers(model.train(), text)
    images = images.float()
    model(images).square().mean().backward()
    for one in block_attentions(model):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.mixer.parameters()), one.name
        assert str(one.spec.activation) == str(model.replaced.specs[one.stage].activation)
    again = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(again(images), model(images))
    assert model.bfloat16()(images[:1].bfloat16()).isfinite().all()


def test_every_adapter_has_a_case() -> None:
    covered = {type(stock(case)[0]) for case in CASES}
    names = {base.__name__ for kind in covered for base in kind.__mro__}
    assert set(ADAPTERS) - names <= {"SwinTransformer", "Qwen3VitEncoder", "DeepseekVitEncoder"}


@pytest.mark.parametrize("case", ["MaxViT", "DaViT", "CAFormer", "ConvNeXt", "EVA-02", "Hiera"])
def test_explain_shows_the_mixers_of_the_stock_model(case: str) -> None:
    model, images = stock(case)
    found = kernelbank.explain(model, images)
    assert torch.allclose(found.output, model(images))
    assert [layer.name for layer in found] == [one.name for one in block_attentions(model)]
    assert not any(isinstance(module, SeatedMixer) for module in model.modules())


def test_the_windows_and_the_grids_of_a_stage_of_maxvit_have_specs_of_their_own() -> None:
    model, images = stock("MaxViT")
    count = 1 + max(one.stage for one in block_attentions(model))
    replace_mixers(model, " | ".join(["activation=relu,count", "activation=identity,count"] * (count // 2)))
    assert [spec.activation[0].name for spec in model.replaced.specs] == ["relu", "identity"] * (count // 2)
    assert model(images).isfinite().all()


def test_what_no_spec_describes_stays_and_is_listed() -> None:
    model, _ = stock("DaViT")
    replace_mixers(model, "activation=relu,count")
    assert all(type(model.get_submodule(left.name)).__name__ == "ChannelAttention" for left in model.replaced.left)
    assert model.replaced.left
    assert "left" in str(model.replaced) and "attends between channels" in str(model.replaced)


def test_features_only_is_unwrapped() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), img_size=64)
    assert replace_mixers(model, "activation=relu,count") is model
    assert all(map(torch.isfinite, (feature.sum() for feature in model(torch.randn(1, 3, 64, 64)))))
    assert any(isinstance(module, SeatedMixer) for module in model.modules())


def test_patches_with_coordinates_need_a_spec_without_a_grid() -> None:
    model, _ = stock("NaFlexViT")
    patches = torch.randn(2, 6, 16 * 16 * 3, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    coordinates = torch.stack([y, x], -1).reshape(1, 6, 2).repeat(2, 1, 1)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    batch = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    before = model(batch)
    replace_mixers(model, "bias=True")
    assert torch.allclose(model(batch), before, atol=1e-9)
    replace_mixers(model, "position=relative")
    with pytest.raises(SpecError, match="patches with coordinates"):
        model(batch)
    assert model(torch.randn(1, 3, 32, 48, dtype=torch.float64)).isfinite().all()


def learned(model: Any) -> None:
    model.rope = timm.layers.RotaryEmbeddingMixed(dim=48, depth=2, num_heads=4)


def other_angles(model: Any) -> None:
    model.rope.pos_embed = model.rope.pos_embed * 1.01


def pixels(model: Any) -> None:
    model.rope = RotaryEmbeddingCat(12, in_pixels=True, feat_shape=[3, 4])


REFUSED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "learned rope": ("EVA-02", learned, "RotaryEmbeddingMixed"),
    "other angles": ("EVA-02", other_angles, "angles differ"),
    "rope in pixels": ("EVA-02", pixels, "in_pixels=True"),
    "gated": ("EVA-02", lambda m: setattr(m.blocks[1].attn, "gate", nn.Linear(48, 48)), "gated"),
    "a hook": ("DaViT", lambda m: m.stages[0].blocks[0][0].attn.register_forward_hook(print), "hooks"),
    "an adapter": ("BEiT", lambda m: setattr(m.blocks[0].attn, "proj", nn.Sequential()), "Sequential"),
    "dropped patches": ("EVA-02", lambda m: setattr(m, "patch_drop", timm.layers.PatchDropout(0.5)), "patch_drop"),
    "no pooling": ("PoolFormer", lambda m: setattr(m.stages[0].blocks[0].token_mixer, "pool", nn.Identity()), "pool"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_field_and_leaves_the_model(case: str) -> None:
    name, change, message = REFUSED[case]
    model, _ = stock(name)
    change(model)
    with pytest.raises(InputError, match=message):
        replace_mixers(model, "activation=relu,count")
    assert not any(isinstance(module, SeatedMixer) for module in model.modules())


def test_a_model_of_which_no_spec_describes_a_part_is_refused_with_the_reason() -> None:
    model = timm.create_model("convformer_s18")
    with pytest.raises(InputError, match="SepConv mixes more channels"):
        replace_mixers(model, "vit")


# ---- coverage --------------------------------------------------------------------------------------------

TAKEN = 761
"""The pretrained tags of timm 1.0.31 that `replace_mixers` takes."""


@pytest.mark.slow
def test_the_number_of_pretrained_models_that_are_taken() -> None:
    from kernelbank.analysis.coverage import coverage

    assert sum(one.tags for one in coverage() if one.taken) >= TAKEN


def test_coverage_counts_blocks_and_reasons() -> None:
    assert set(candidates({"resnet50": 3, "beit_base_patch16_224": 2, "vgg11": 1})) == {"beit_base_patch16_224"}
    beit = cover("beit_base_patch16_224", 2)
    assert (beit.kind, beit.tags, beit.taken, beit.left, beit.reason) == ("Beit", 2, 12, 0, "")
    twins = cover("twins_svt_small", 1)
    assert twins.taken > 0 and twins.left > 0
    assert "SepConv" in cover("convformer_s18", 1).reason
    assert "scale_norm" in cover("beit3_base_patch16_224", 1).reason
