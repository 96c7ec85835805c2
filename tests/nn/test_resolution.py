"""Other resolutions: with the published padding softmax rows agree with timm's own resizing, `masked` follows the
definition, and what depends on the grid follows it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone

SWIN = {"img_size": 56, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "num_classes": 3}
VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}

pytestmark = pytest.mark.filterwarnings("ignore:.*non-(contiguous|tuple)")  # timm's own resampling of tables


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def pair(mixer: str, **options: object) -> tuple[nn.Module, nn.Module]:
    stock = spread(timm.models.SwinTransformer(**(SWIN | {"window_size": 7} | options)))
    ours = HierarchicalBackbone(mixer, **(SWIN | options)).double().eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(56, 56), (60, 44), (40, 84), (30, 30), (10, 40)])
def test_built_at_another_size_pad_timm_is_timm(size: tuple[int, int]) -> None:
    """Windows that do not divide the grid, and grids smaller than the window; not square."""
    stock, ours = pair("swin support=window(7, alternate, pad=timm)", img_size=size)
    x = images(size)
    assert torch.allclose(ours(x), stock(x), atol=1e-9)


@pytest.mark.parametrize(("size", "window"), [((60, 44), 7), ((96, 96), 12), ((84, 70), 5), ((30, 30), 7)])
def test_resized_pad_timm_is_timm(size: tuple[int, int], window: int) -> None:
    stock, ours = pair("swin support=window(7, alternate, pad=timm)")
    for model in (stock, ours):
        model.set_input_size(size, window_size=window)
    x = images(size)
    assert torch.allclose(ours(x), stock(x), atol=1e-6)  # timm resamples tables in float32


def test_masked_differs_from_padding_exactly_where_windows_do_not_fit() -> None:
    for size, same in (((56, 56), True), ((60, 44), False)):
        padded = pair("swin support=window(7, alternate, pad=timm)", img_size=size)[1]
        masked = HierarchicalBackbone("swin", **(SWIN | {"img_size": size})).double().eval()
        masked.load_state_dict(padded.state_dict())
        x = images(size)
        assert torch.allclose(masked(x), padded(x), atol=1e-9) == same


def test_windows_keep_the_side_of_the_record_unless_told() -> None:
    ours = HierarchicalBackbone("swin", **SWIN)
    ours.set_input_size((112, 112))
    assert [stage.blocks[1].attn.spec.support.M for stage in ours.layers] == [7, 7, 7]
    ours.set_input_size(window_ratio=4)
    assert [stage.blocks[1].attn.spec.support.M for stage in ours.layers] == [14, 14, 14]
    assert ours.layers[0].blocks[1].attn.spec.support.shift == 7


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_a_vit_is_resized_as_timm_resizes_it(size: tuple[int, int]) -> None:
    stock = spread(timm.models.VisionTransformer(**VIT, reg_tokens=2))
    ours = PlainBackbone("vit", **VIT, reg_tokens=2).double().eval()
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):
        model.set_input_size(size)
    x = images(size)
    assert torch.allclose(ours(x), stock(x), atol=1e-9)


def test_dynamic_images_as_timm() -> None:
    stock = spread(timm.models.VisionTransformer(**VIT, dynamic_img_size=True))
    ours = PlainBackbone("vit", **VIT, dynamic_img_size=True).double().eval()
    ours.load_state_dict(stock.state_dict())
    for size in ((48, 48), (24, 64), (64, 24), (96, 16)):
        x = images(size)
        assert torch.allclose(ours(x), stock(x), atol=1e-9), size


def test_dynamic_images_of_a_swin_are_timms_where_windows_shift() -> None:
    """timm keeps the shift of the size it was built for; the definition shifts where the grid is larger than M."""
    stock, ours = pair("swin support=window(7, alternate, pad=timm)", img_size=64, dynamic_img_size=True)
    for size in ((64, 64), (64, 80), (60, 76)):
        x = images(size)
        assert torch.allclose(ours(x), stock(x), atol=1e-9), size


@pytest.mark.parametrize("mixer", ["vit_relpos", "dwsa", "linformer mix=project(4)", "dwsa support=window(3)", "nat",
                                   "strided_bank", "dwnet"])  # fmt: skip
@pytest.mark.parametrize("tokens", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class", "avg"])
def test_dynamic_images_are_those_of_a_resized_model(mixer: str, tokens: dict) -> None:
    dynamic = spread(PlainBackbone(mixer, **VIT, **tokens, dynamic_img_size=True))
    for size in ((64, 40), (40, 64), (24, 24)):
        fixed = PlainBackbone(mixer, **VIT, **tokens).double().eval()
        fixed.load_state_dict(dynamic.state_dict())
        fixed.set_input_size(size)
        x = images(size)
        assert torch.allclose(dynamic(x), fixed(x), atol=1e-6), size


def test_padded_dynamic_images() -> None:
    model = spread(PlainBackbone("vit_relpos", **VIT, dynamic_img_size=True, dynamic_img_pad=True))
    assert model(images((50, 61))).shape == (2, 3)


def test_resizing_there_and_back_at_the_same_size_changes_nothing() -> None:
    for model in (PlainBackbone("vit_relpos", **VIT), HierarchicalBackbone("dwsa_window", **SWIN)):
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        model.set_input_size(model.patch_embed.img_size)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
