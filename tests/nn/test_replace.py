"""replace_mixers on stock timm models: exact when nothing changes, every tensor accounted for, clear refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import kernelbank.models  # noqa: F401
from kernelbank import SpecError, replace_mixers
from kernelbank.errors import InputError

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 3}
SWIN = {"img_size": 64, "patch_size": 2, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 3,
        "window_size": 4}  # fmt: skip


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**(VIT | options)).double().eval()
    _spread(model)
    return model


def swin(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.SwinTransformer(**(SWIN | options)).double().eval()
    _spread(model)
    return model


def _spread(model: nn.Module) -> None:
    """Weights far from timm's small ones, so that every term of the attention shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def images(model: nn.Module, size: tuple[int, int] | None = None) -> torch.Tensor:
    return torch.randn(2, 3, *(size or model.patch_embed.img_size), dtype=torch.float64)


STOCK = {
    "class token": vit,
    "registers, LayerScale (DINOv2)": lambda: vit(reg_tokens=4, init_values=0.5, no_embed_class=True),
    "no_embed_class, LayerScale (DeiT-3)": lambda: vit(no_embed_class=True, init_values=0.7),
    "qk_norm": lambda: vit(qk_norm=True),
    "average pooling, no position": lambda: vit(class_token=False, global_pool="avg", pos_embed="none"),
    "attention pooling": lambda: vit(class_token=False, global_pool="map"),
    "no biases": lambda: vit(qkv_bias=False, proj_bias=False),
    "post-norm": lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock),
    "SwiGLU": lambda: vit(mlp_layer=timm.layers.SwiGLUPacked),
    "not square": lambda: vit(img_size=(24, 40)),
    "windows that divide": swin,
    "windows that do not": lambda: swin(img_size=(36, 44), window_size=5),
    "windows cut by the grid": lambda: swin(img_size=(16, 28), window_size=7),
    "no qkv bias": lambda: swin(qkv_bias=False),
}


@pytest.mark.parametrize("stock", STOCK.values(), ids=STOCK)
def test_the_same_record_is_the_same_model(stock: object) -> None:
    model = stock()
    x = images(model)
    before = model(x)
    assert replace_mixers(model, "bias=True") is model  # where there was none: zeros
    assert torch.allclose(model(x), before, atol=1e-9)
    assert {line.verdict for line in model.replaced.lines} <= {"kept", "initialised"}


@pytest.mark.parametrize("text", ["activation=relu,count", "dwsa", "linformer mix=project(3)", "vit3", "se",
                                  "vit activation=layernorm,count position=relative"])  # fmt: skip
@pytest.mark.parametrize("stock", [lambda: vit(reg_tokens=2, init_values=0.5), swin], ids=["vit", "swin"])
def test_any_record_runs_learns_and_is_accounted_for(stock: object, text: str) -> None:
    model = stock()
    kept = {id(p) for n, p in model.named_parameters() if ".attn." not in n}
    tensors = len(model.state_dict())
    mixers = [m for n, m in model.named_modules() if n.endswith(".attn")]
    outside = tensors - sum(len(m.state_dict()) for m in mixers)
    replace_mixers(model.train(), text)
    assert model.replaced.others == outside
    model(images(model)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert kept == {id(p) for n, p in model.named_parameters() if ".attn." not in n}
    held = sum(len(m.state_dict()) for n, m in model.named_modules() if n.endswith(".attn"))
    assert sum(line.verdict != "dropped" for line in model.replaced.lines) == held


def test_kept_parameters_have_their_values() -> None:
    model = vit()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_mixers(model, "activation=relu,count position=relative")
    q, k, v = state["blocks.0.attn.qkv.weight"].chunk(3)
    attn = model.blocks[0].attn
    assert all(torch.equal(*pair) for pair in ((attn.q.weight, q), (attn.key.weight, k), (attn.value.weight, v)))
    assert torch.equal(attn.out.weight, state["blocks.0.attn.proj.weight"])
    assert "blocks.0-1.attn.table.weight" in str(model.replaced) and "initialised" in str(model.replaced)


def test_cells_change_each_stage_and_a_record_a_stage_is_taken() -> None:
    model = replace_mixers(swin(), "activation=relu,count | dwsa_window support=window(2, alternate)")
    assert [str(m) for m in model.replaced.specs] == [
        "swin support=window(4, alternate) activation=relu,count", "dwsa_window support=window(2, alternate)",
    ]  # fmt: skip
    assert [b.attn.spec.support.shift for b in model.layers[1].blocks] == [0, 1]


def test_replacing_again_starts_from_what_is_there() -> None:
    for model in (vit(), swin()):
        x = images(model)
        replace_mixers(model, "position=relative")
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        before = model(x)
        replace_mixers(model, "bias=True")
        assert torch.equal(model(x), before)
        assert {line.verdict for line in model.replaced.lines} == {"kept"}
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


@pytest.mark.parametrize("stock", [vit, lambda: swin(depths=(2, 2))], ids=["vit", "swin"])
def test_a_shift_alternates_through_repeated_changes(stock: object) -> None:
    model = stock()
    for text in ("swin support=window(2, alternate)", "activation=relu,count", "bias=False"):
        replace_mixers(model, text)
        mixers = [module for name, module in model.named_modules() if name.endswith(".attn")]
        assert [mixer.spec.support.shift for mixer in mixers] == [0, 1] * (len(mixers) // 2)


def test_a_projection_without_bias_gets_one_of_zeros_and_dtypes_stay() -> None:
    model = vit(proj_bias=False, qk_norm=True)
    model.blocks[0].attn.qkv.float()
    replace_mixers(model, "activation=relu,count")
    attn = model.blocks[0].attn
    assert ("blocks.0.attn.out.bias", "initialised", "zeros") in [
        (line.name, line.verdict, line.how) for line in model.replaced.lines
    ]
    assert (attn.out.bias == 0).all()
    assert (attn.q.weight.dtype, attn.q_norm.weight.dtype) == (torch.float32, torch.float64)


def test_a_dynamic_swin_pads_as_timm_on_every_image() -> None:
    model = swin(img_size=64, dynamic_img_size=True)
    x = images(model, (72, 84))
    before = model(x)
    replace_mixers(model, "bias=True")
    assert torch.allclose(model(x), before, atol=1e-9)


def test_partly_frozen_stays_partly_frozen() -> None:
    model = vit()
    for block in model.blocks:
        block.attn.qkv.bias.requires_grad_(False)
        block.attn.proj.requires_grad_(False)
    replace_mixers(model, "position=relative")
    frozen = {name.rpartition("attn.")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"q.bias", "key.bias", "value.bias", "out.weight", "out.bias"}


def test_a_vit_follows_its_own_resizing_and_dynamic_images() -> None:
    model = replace_mixers(vit(), "position=relative")
    model.set_input_size((24, 48))
    assert model(images(model)).isfinite().all()
    dynamic = replace_mixers(vit(dynamic_img_size=True), "dwsa")
    for size in ((32, 32), (16, 48), (48, 16)):
        assert dynamic(images(dynamic, size)).isfinite().all()
    assert not torch.equal(dynamic(images(dynamic, (48, 16))), dynamic(images(dynamic, (16, 48))))


@pytest.mark.filterwarnings("ignore:.*non-(contiguous|tuple)")  # timm's own resizing
def test_a_swin_is_resized_as_timm_resizes_it() -> None:
    stock, ours = swin(), replace_mixers(swin(), "bias=True")
    for size, window, side in (((128, 128), None, 8), ((32, 48), 4, 4), ((40, 64), 5, 5)):
        for model in (stock, ours):
            model.set_input_size(size, window_size=window)
        assert [stage.blocks[0].attn.spec.support.M for stage in ours.layers] == [side] * 2
        if size != (40, 64):  # there windows do not divide the grid: timm pads, the record's pad=masked does not
            x = images(ours)
            assert torch.allclose(ours(x), stock(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*non-(contiguous|tuple)")
def test_a_replaced_swin_keeps_its_windows_at_the_same_size_and_resizes_from_them() -> None:
    model = replace_mixers(swin(), "support=window(2, alternate)")
    model.set_input_size((64, 64))
    sides = lambda: [stage.blocks[0].attn.spec.support.M for stage in model.layers]  # noqa: E731
    assert sides() == [2, 2]
    model.set_input_size((128, 128))
    assert sides() == [4, 4]
    without = replace_mixers(swin(), "dwsa")
    without.set_input_size((64, 128))  # windows that are not square are nothing to a record without windows
    assert without(images(without)).isfinite().all()


def test_copies_and_pickles() -> None:
    for model in (replace_mixers(vit(), "dwsa"), replace_mixers(swin(), "dwsa_window")):
        x = images(model)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        if hasattr(model, "blocks"):
            assert twin.blocks[0].attn.token_grid.patch_embed is twin.patch_embed


def test_our_backbones_too() -> None:
    model = timm.create_model("swin_kb_test_patch4_window7_64", num_classes=2).eval()
    replace_mixers(model, "activation=relu,count")
    assert model.layers[0].blocks[0].attn.spec.activation[0].name == "relu"
    assert model._model_args["mixer"].startswith("swin activation=relu,count |")


class OwnForward(timm.models.swin_transformer.SwinTransformerBlock):
    pass


def hooked() -> nn.Module:
    model = vit()
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    return model


def normed() -> nn.Module:
    model = vit()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    return model


def pruned() -> nn.Module:
    model = vit()
    prune.l1_unstructured(model.blocks[0].attn.proj, "weight", 0.5)
    return model


def patched() -> nn.Module:
    model = vit()
    model.blocks[0].attn.qkv.forward = lambda x: x
    return model


def shared() -> nn.Module:
    model = vit()
    model.blocks[1].attn = model.blocks[0].attn
    return model


def shifted() -> nn.Module:
    model = swin()
    model.layers[1].blocks[1].shift_size = (1, 1)
    return model


def subclassed() -> nn.Module:
    model = swin()
    model.layers[0].blocks[0].__class__ = OwnForward
    return model


BLOCKS = timm.models.vision_transformer
REFUSED = {
    "another model": (lambda: timm.create_model("test_resnet"), "vit", "invalid class ResNet; expected timm's"),
    "parallel blocks": (lambda: vit(block_fn=BLOCKS.ParallelScalingBlock), "vit",
                        r"blocks\.0\.attn: invalid attention=None; expected timm's Attention"),
    "differential attention": (lambda: vit(attn_layer="diff"), "vit", "attention=DiffAttention"),
    "scale_norm": (lambda: vit(scale_attn_norm=True), "vit", "scale_norm has no place in a spec"),
    "another qk_norm": (lambda: vit(qk_norm=True, norm_layer=timm.layers.SimpleNorm), "vit", "norm_layer of qk_norm"),
    "eps of qk_norm": (lambda: vit(qk_norm=True, norm_layer=nn.LayerNorm), "vit", "eps 1e-06"),
    "dropped patches": (lambda: vit(patch_drop_rate=0.5), "vit", "patch_drop_rate"),
    "dynamic, refused late": (lambda: vit(dynamic_img_size=True), "involution kernel=grouped(32)", "a multiple of 32"),
    "hooks": (hooked, "vit", r"invalid blocks\.1\.attn\.qkv with hooks"),
    "computed weights": (normed, "vit", "a ParametrizedLinear"),
    "pruned weights": (pruned, "vit", r"invalid blocks\.0\.attn\.proj with hooks"),
    "a forward of its own": (patched, "vit", r"invalid blocks\.0\.attn\.qkv with a forward of its own"),
    "shared attention": (shared, "vit", "attn, which several blocks share"),
    "another shift": (shifted, "swin", r"invalid shift_size=\(1, 1\); expected \(2, 2\)"),
    "another frame": (vit, "ddwconv", "invalid frame=bn_relu in place of linear"),
    "another Swin block": (subclassed, "swin", r"layers\.0\.blocks\.0: invalid class OwnForward"),
    "windows not square": (lambda: swin(window_size=(4, 8)), "bias=True", r"invalid window_size=\(4, 8\)"),
    "always_partition": (lambda: swin(img_size=8, always_partition=True), "bias=True", "always_partition=True"),
    "head_dim": (lambda: swin(head_dim=3), "bias=True", "invalid head_dim"),
    "too many records": (swin, "swin | swin | swin", "expected 1 or 2 specs for 2 stages, got 3"),
    "a record that does not fit": (vit, "involution kernel=grouped(32)", "invalid dim=24; expected"),
    "an unknown cell": (vit, "activatoin=relu", "did you mean 'activation'"),
    "no text": (vit, None, "invalid spec None; expected text"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "text", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_field_and_leave_the_model(make: object, text: str, message: str) -> None:
    model = make()
    modules = {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((SpecError, InputError), match=message):
        replace_mixers(model, text)
    assert {name: (type(m), len(m._forward_hooks)) for name, m in model.named_modules()} == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "replaced")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda model: nn.DataParallel(compiled(model))])
def test_the_model_in_a_wrapper_is_changed(wrap: Any) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2).eval()
    wrapped, x = wrap(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        softmax = wrapped(x)
        assert replace_mixers(wrapped, "activation=relu,count") is wrapped
        assert torch.equal(wrapped(x), model(x))
        assert not torch.allclose(wrapped(x), softmax)
    assert "relu_attention" in str(model.replaced)


def test_distributed_data_parallel_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(InputError, match="expected its module, wrapped afterwards"):
        replace_mixers(wrapped, "activation=relu,count")
