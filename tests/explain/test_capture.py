"""`explain` on whole models: ours and timm's stock ones, and nothing about the model changes."""

from __future__ import annotations

import importlib

import pytest
import timm
import torch
from tiny_models import PLAIN, STAGES, drawn
from torch import nn

import kernelbank
import kernelbank.models
from kernelbank.errors import InputError
from kernelbank.explanation.capture import Explanation, explain

VIT = PLAIN | {"num_heads": 4}


def stock_vit(**kwargs: object) -> nn.Module:
    return drawn(timm.models.VisionTransformer(**(VIT | kwargs))).double()


def stock_swin(**kwargs: object) -> nn.Module:
    return drawn(timm.models.SwinTransformer(**(STAGES | kwargs))).double()


def images(model: nn.Module, batch: int = 2, side: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(batch, 3, *side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Outputs:
    """What enters the out projection of every attention of a stock model."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith("attn.proj"):
                module.register_forward_pre_hook(lambda _, args, name=name: self.seen.update({name: args[0]}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"},
                                     {"qk_norm": True}, {"dynamic_img_size": True}], ids=str)  # fmt: skip
def test_a_stock_vit(options: dict[str, object], fused: bool) -> None:
    model = stock_vit(**options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = images(model, side=(32, 48) if "dynamic_img_size" in options else (32, 32))
    explanation = explain(model, x)
    entered = Outputs(model)
    expected = model(x)
    torch.testing.assert_close(explanation.output, expected, rtol=0, atol=0)
    assert [layer.name for layer in explanation] == ["blocks.0.attn", "blocks.1.attn"]
    for layer in explanation:
        o = layer.output().values.transpose(1, 2).flatten(2)
        torch.testing.assert_close(o, entered.seen[f"{layer.name}.proj"], rtol=1e-9, atol=1e-9)
        assert layer.weights is not None
        torch.testing.assert_close(layer.weights.values.sum(-1), torch.ones_like(layer.weights.values[..., 0]))


@pytest.mark.parametrize("options", [{}, {"window_size": 4}, {"img_size": 36, "window_size": 4}], ids=str)
def test_a_stock_swin_equals_the_backbone_that_is_read_from_it(options: dict[str, object]) -> None:
    model = stock_swin(**options)
    side = int(options.get("img_size", 32))  # type: ignore[call-overload]
    x = images(model, side=(side, side))
    stock, ours = explain(model, x), explain(kernelbank.from_timm(model), x)
    torch.testing.assert_close(stock.output, model(x), rtol=0, atol=0)
    assert [layer.name for layer in stock][2:4] == ["layers.1.blocks.0.attn", "layers.1.blocks.1.attn"]
    for a, b in zip(stock, ours, strict=True):
        assert a.name == b.name and a.grid == b.grid
        torch.testing.assert_close(a.output().values, b.output().values, rtol=1e-8, atol=1e-8)
    projected = stock["layers.0.blocks.1.attn"]
    block = model.layers[0].blocks[1]
    o = projected.output().values.transpose(1, 2).flatten(2)
    entered: list[torch.Tensor] = []
    block.attn.register_forward_hook(lambda _, args, y: entered.append(y))
    model(x)
    if "img_size" not in options:  # windows that divide the grid: undo partition and roll
        size, grid = block.window_size[0], block.input_resolution
        y = timm.models.swin_transformer.window_reverse(entered[0].view(-1, size, size, 16), (size, size), *grid)
        y = torch.roll(y, tuple(block.shift_size), (1, 2)).flatten(1, 2)
        torch.testing.assert_close(block.attn.proj(o), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", ["nat", "dwsa", "relu_attention", "ddwconv", "involution", "conv", "linformer", "se"])
def test_our_backbones(text: str) -> None:
    name = "dwnet_test" if text == "ddwconv" else "swin_kb_test_patch4_window7_64"
    model = drawn(timm.create_model(name, mixer=text), 0.05).double()
    explanation = explain(model, images(model, side=(64, 64)))
    assert len(explanation) == 6 and explanation["layers.3.blocks.1.attn"].grid == (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(explanation.output, model(images(model, side=(64, 64))), rtol=0, atol=0)


def test_models_whose_mixers_were_replaced() -> None:
    for model in (stock_vit(), stock_swin()):
        kernelbank.replace_mixers(model, "activation=relu,count")
        x = images(model)
        for layer in explain(model, x):
            assert layer.spec.text["activation"] == "relu,count" and layer.weights is not None
            assert bool((layer.weights.values >= 0).all())


def test_layers_by_number_and_name_and_mlps_by_name() -> None:
    model = drawn(timm.create_model("vit_kb_test_patch16_64")).double()
    x = images(model, side=(64, 64))
    assert [layer.name for layer in explain(model, x, layers=[-1, 0])] == ["blocks.0.attn", "blocks.2.attn"]
    (layer,) = explain(model, x, layers=["blocks.1.mlp"], positions=[(0, 0), 0])
    assert layer.weights is not None and layer.weights.sizes == {"image": 2, "head": 1, "position": 2, "kernel": 256}
    with pytest.raises(InputError, match=r"unknown layer 'blocks.1.atn'; did you mean 'blocks.1.attn'"):
        explain(model, x, layers=["blocks.1.atn"])
    with pytest.raises(InputError, match="unknown layer 3; expected 0 to 2"):
        explain(model, x, layers=[3])


def state(model: nn.Module) -> list[object]:
    return [
        [(name, module.training, dict(vars(module))["_forward_hooks"].copy(), module._forward_pre_hooks.copy())
         for name, module in model.named_modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.get_rng_state(),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [stock_vit, stock_swin])
def test_the_model_its_mode_its_hooks_and_the_generators_stay(kind: object) -> None:
    model = kind(drop_path_rate=0.5)  # type: ignore[operator]
    if kind is stock_vit:
        model = kernelbank.from_timm(model)
    model.train()
    model.head.eval()
    seen: list[int] = []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    before = state(model)
    first, second = explain(model, images(model)), explain(model, images(model))
    after = state(model)
    assert before[0] == after[0] and len(seen) == 2
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert torch.equal(before[2], after[2])  # type: ignore[call-overload]
    torch.testing.assert_close(first.output, second.output, rtol=0, atol=0)
    assert not first.output.requires_grad and torch.is_grad_enabled()


def test_hooked_layers_take_part_in_our_mixers_and_are_refused_in_stock_attention() -> None:
    model = drawn(timm.create_model("vit_kb_test_patch16_64")).double()
    x = images(model, side=(64, 64))
    plain = explain(model, x)[0].weights
    handle = model.blocks[0].attn.q.register_forward_hook(lambda *args: 2 * args[2])
    hooked = explain(model, x)[0]
    handle.remove()
    assert plain is not None and hooked.weights is not None and hooked.scores is not None
    torch.testing.assert_close(hooked.weights.values, torch.softmax(hooked.scores.values, -1))
    assert float((hooked.weights.values - plain.values).abs().max()) > 1e-3
    stock = stock_vit()
    stock.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    with pytest.raises(InputError, match=r"invalid blocks.1.attn.qkv with hooks"):
        explain(stock, images(stock))


def test_hooks_are_removed_where_the_forward_fails() -> None:
    model = drawn(timm.create_model("vit_kb_test_patch16_64")).train()
    before = state(model)
    with pytest.raises(AssertionError):
        explain(model, torch.randn(1, 3, 32, 32))
    assert before[0] == state(model)[0]


def test_half_precision_and_autocast() -> None:
    model = drawn(timm.create_model("vit_kb_test_patch16_64"), 0.05)
    x = images(model, side=(64, 64)).float()
    exact = explain(model, x)[1].weights
    with torch.autocast("cpu", torch.bfloat16):
        cast = explain(model, x)[1].weights
    half = explain(model.to(torch.bfloat16), x.to(torch.bfloat16))[1].weights
    assert exact is not None and cast is not None and half is not None
    assert cast.values.dtype == half.values.dtype == torch.float32
    for other in (cast, half):
        torch.testing.assert_close(other.values, exact.values, rtol=0.1, atol=0.02)


def test_a_model_that_does_not_call_a_layer() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = kernelbank.Mixer("vit", 8, 2, (2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(InputError, match="invalid layer mixer, which the model does not call"):
        explain(Idle().eval(), torch.zeros(1, 4, 8))


def test_the_public_name() -> None:
    mixer = kernelbank.Mixer("vit", 8, 2, (2, 2))
    assert isinstance(kernelbank.explain(mixer.eval(), torch.zeros(1, 4, 8)), Explanation)
    importlib.import_module("kernelbank.explanation.maps")
    assert callable(kernelbank.explain)


def test_memory_of_windows_is_that_of_their_regions() -> None:
    """A map of 784 positions in windows of 49 has 49 kernels per position, not 784."""
    mixer = kernelbank.Mixer("swin support=window(7, shift=0)", 32, 2, (28, 28)).eval()
    (layer,) = kernelbank.explain(mixer, torch.randn(1, 784, 32))
    assert layer.weights is not None and layer.weights.sizes["kernel"] == 49
