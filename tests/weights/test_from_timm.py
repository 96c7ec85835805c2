"""from_timm: stock models become our backbones with the same outputs; what does not fit is named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, GluMlp, RmsNorm
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from tiny_models import PLAIN, STAGES, drawn
from torch import nn

import kernelbank
from kernelbank import SpecError, replace_mixers
from kernelbank.errors import InputError
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone
from kernelbank.weights.from_timm import from_timm, read_model
from kernelbank.weights.stock import build_stock

PLAINS: dict[str, dict[str, Any]] = {
    "deit": {},
    "dinov2 with registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, "patch_size": 4},
    "registers embedded": {"reg_tokens": 2},
    "qk_norm": {"qk_norm": True, "num_heads": 4},
    "average": {"global_pool": "avg"},
    "average without class token": {"global_pool": "avg", "class_token": False, "pos_embed": "none"},
    "average with prefix": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "average and maximum": {"global_pool": "avgmax"},
    "no head": {"num_classes": 0},
    "unpooled": {"num_classes": 0, "global_pool": ""},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "clip": {"pre_norm": True, "norm_layer": nn.LayerNorm},
    "no final norm": {"final_norm": False},
    "another mlp": {"mlp_ratio": 2.5, "act_layer": nn.ReLU},
    "silu": {"act_layer": "silu"},
    "oblong grey": {"img_size": (16, 40), "in_chans": 1, "num_heads": 8},
    "oblong patches": {"img_size": (32, 32), "patch_size": (4, 8)},
}
STAGED: dict[str, dict[str, Any]] = {
    "swin": {},
    "padded by timm": {"img_size": (28, 20)},
    "windows cut by the grid": {"img_size": 16, "window_size": 4},
    "oblong": {"img_size": (32, 16)},
    "windows by stage": {"window_size": ((4, 4), (2, 2), (2, 2), (2, 2))},
    "two stages with different windows": {
        "img_size": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": ((4, 4), (2, 2)),
    },
    "no bias": {"qkv_bias": False, "mlp_ratio": 3.0},
    "mlps by stage": {"mlp_ratio": (2.0, 3.0, 4.0, 1.5)},
    "no head": {"num_classes": 0},
}


def models() -> list[Any]:
    plain = [pytest.param(VisionTransformer, PLAIN | more, id=name) for name, more in PLAINS.items()]
    return plain + [pytest.param(SwinTransformer, STAGES | more, id=name) for name, more in STAGED.items()]


@pytest.mark.parametrize(("kind", "arguments"), models())
def test_what_is_read_off_a_model_builds_it_again(kind: Any, arguments: dict[str, Any]) -> None:
    model = drawn(kind(**arguments)).double()
    again = build_stock(read_model(model)).double()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, model.in_chans, *model.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("kind", "arguments"), models())
def test_the_backbone_computes_what_the_model_computes(kind: Any, arguments: dict[str, Any]) -> None:
    model = drawn(kind(**arguments)).double()
    backbone = from_timm(model)
    assert type(backbone) is (PlainBackbone if kind is VisionTransformer else HierarchicalBackbone)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        expected, out = model(images), backbone(images)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            backbone.forward_features(images), model.forward_features(images), rtol=1e-9, atol=1e-9
        )
    assert expected.abs().max() > 1e-3
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in backbone.parameters()}
    assert not shared and all(p.dtype == torch.float64 for p in backbone.parameters())


def test_gradients_are_those_of_the_model() -> None:
    model = drawn(VisionTransformer(**PLAIN)).double()
    backbone = from_timm(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(images).sum().backward()
    backbone(images).sum().backward()
    qkv = model.blocks[1].attn.qkv.weight.grad.chunk(3)
    for name, expected in zip(("q", "key", "value"), qkv, strict=True):
        torch.testing.assert_close(getattr(backbone.blocks[1].attn, name).weight.grad, expected)
    torch.testing.assert_close(backbone.pos_embed.grad, model.pos_embed.grad)


def test_mode_dropout_and_frozen_parameters_stay() -> None:
    model = VisionTransformer(**PLAIN, drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4,
                              drop_path_rate=0.5).train()  # fmt: skip
    model.blocks[0].attn.qkv.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    backbone = from_timm(model)
    assert backbone.training and not from_timm(model.eval()).training
    assert (backbone.head_drop.p, backbone.pos_drop.p) == (0.1, 0.2)
    assert (backbone.blocks[0].attn.proj_drop, backbone.blocks[0].attn.attn_drop) == (0.3, 0.4)
    assert backbone.blocks[-1].drop_path1.drop_prob == 0.5
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        "cls_token",
        *(f"blocks.0.attn.{n}.{k}" for n in ("q", "key", "value") for k in ("weight", "bias")),
    }


def test_other_image_sizes_still_work() -> None:
    model = drawn(VisionTransformer(**PLAIN, dynamic_img_size=True)).double()
    images = torch.randn(1, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(from_timm(model)(images), model(images), rtol=1e-9, atol=1e-9)


def test_a_name_a_mixer_and_the_table() -> None:
    backbone = kernelbank.from_timm(
        "vit_tiny_patch16_224", "activation=relu,count", img_size=32, depth=1, num_classes=3, drop_rate=0.1
    )
    assert str(backbone.blocks[0].attn.spec) == "relu_attention"
    assert "blocks.0.attn.q.weight" in str(backbone.replaced) and backbone.head_drop.p == 0.1
    data = timm.data.resolve_model_data_config(backbone)
    assert data["mean"] == (0.5, 0.5, 0.5)  # vit_tiny's own, not DeiT's


def test_the_same_as_replacing_in_place() -> None:
    model = drawn(SwinTransformer(**STAGES)).double()
    ours = from_timm(model, "activation=relu,count")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = kernelbank.replace_mixers(model, "activation=relu,count")(images)
    torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "arguments", "text"), [
    (VisionTransformer, PLAIN, "activation=relu,count position=relative"),
    (VisionTransformer, PLAIN | {"qk_norm": True, "num_heads": 4, "proj_bias": False}, "activation=relu,count"),
    (VisionTransformer, PLAIN, "dwsa"),
    (SwinTransformer, STAGES, "activation=relu,count"),
    (SwinTransformer, STAGES, "dwsa_window"),
])  # fmt: skip
def test_a_model_whose_mixers_were_replaced_becomes_a_backbone(kind: Any, arguments: Any, text: str) -> None:
    model = kernelbank.replace_mixers(drawn(kind(**arguments)).double(), text)
    model.patch_embed.requires_grad_(False)
    first = (model.blocks if kind is VisionTransformer else model.layers[0].blocks)[0].attn
    getattr(first, first.linears[0]).requires_grad_(False)
    backbone = from_timm(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(backbone(images), model(images), rtol=1e-9, atol=1e-9)
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert any("patch_embed" in name for name in frozen) and any(f".attn.{first.linears[0]}." in n for n in frozen)
    other = from_timm(model, "bias=True")  # and again
    assert other(images).isfinite().all()


@pytest.mark.parametrize(("more", "match"), [
    ({"norm_layer": RmsNorm}, r"norm1: invalid norm_layer=RmsNorm; expected an affine LayerNorm"),
    ({"block_fn": ParallelScalingBlock}, r"blocks\.0: invalid block_fn=ParallelScalingBlock; expected Block"),
    ({"mlp_layer": GluMlp}, r"mlp of block 0: invalid mlp_layer=GluMlp; expected Mlp"),
    ({"act_layer": "gelu_tanh"}, r"mlp of block 0: invalid act_layer=.*; expected gelu, relu, silu"),
    ({"act_layer": partial(nn.GELU, approximate="tanh")}, r"invalid act_layer=GELU\(approximate='tanh'\)"),
    ({"global_pool": "map"}, r"attn_pool: invalid global_pool='map'; expected token, avg"),
    ({"scale_attn_norm": True}, "scale_norm"),
    ({"scale_mlp_norm": True}, "invalid scale_mlp_norm=LayerNorm"),
    ({"embed_norm_layer": nn.LayerNorm}, r"patch_embed\.norm: invalid embed_norm_layer=LayerNorm"),
    ({"attn_layer": "diff"}, "attention=DiffAttention"),
])  # fmt: skip
def test_what_our_trunks_do_not_have_is_named(more: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        from_timm(VisionTransformer(**PLAIN | more))


def test_other_models_are_refused() -> None:
    class Eager(Attention):
        pass

    subclass = VisionTransformer(**PLAIN)
    subclass.blocks[1].attn.__class__ = Eager
    with pytest.raises(InputError, match=r"blocks\.1\.attn: invalid attention=Eager"):
        from_timm(subclass)
    with pytest.raises(InputError, match="a ResNet; expected timm's VisionTransformer or SwinTransformer"):
        from_timm("resnet18")
    with pytest.raises(InputError, match="a VisionTransformerDistilled; expected"):
        from_timm("deit_tiny_distilled_patch16_224", depth=1)
    with pytest.raises(InputError, match="invalid always_partition=True"):
        from_timm(SwinTransformer(**STAGES | {"always_partition": True, "img_size": 16}))
    with pytest.raises(InputError, match="head_dim"):
        from_timm(SwinTransformer(**STAGES | {"head_dim": 4}))
    with pytest.raises(InputError, match="unknown model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"):
        from_timm("vit_tinny_patch16_224")
    with pytest.raises(InputError, match=r"model vit_tiny_patch16_224: .*nonsense"):
        from_timm("vit_tiny_patch16_224", nonsense=3)
    with pytest.raises(SpecError, match=r"invalid img_size=\(33, 33\); expected sides divisible by the patch"):
        from_timm("vit_tiny_patch16_224", img_size=33, depth=1)
    with pytest.raises(InputError, match="invalid depth: the model is built already"):
        from_timm(VisionTransformer(**PLAIN), depth=3)
    norms = VisionTransformer(**PLAIN)
    norms.blocks[1].norm2.eps = 1e-3
    with pytest.raises(InputError, match=r"norm_layer: invalid eps .*0\.001 in blocks\.1\.norm2; expected one for all"):
        from_timm(norms)


@pytest.mark.parametrize("text", [
    "activation=relu,count", "activation=batchnorm,count position=relative", "dwsa", "ddwconv frame=linear",
])  # fmt: skip
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_whose_mixers_were_replaced(name: str, text: str) -> None:
    sizes = {"depths": (1, 2, 1, 1)} if "swin" in name else {"depth": 2, "qk_norm": True}
    if "swin" in name and "frame" in text:
        text += " size=3"
    model = replace_mixers(timm.create_model(name, img_size=64, **sizes), text).eval()
    for parameter in model.patch_embed.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64)
    backbone = from_timm(model)
    with torch.no_grad():
        assert torch.allclose(backbone(x), model(x), atol=1e-5)
    assert [n for n, p in backbone.named_parameters() if not p.requires_grad] == [
        "patch_embed.proj.weight", "patch_embed.proj.bias",
        *(["patch_embed.norm.weight", "patch_embed.norm.bias"] if "swin" in name else []),
    ]  # fmt: skip
