"""The registered models behave as timm's do: what timm's own tests ask, and what they do not (ecosystem 1.2)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from kernelbank import SpecError, models, replace_mixers
from kernelbank.atlas import ROWS
from kernelbank.nn.block import Block
from kernelbank.zoo import MODELS

SMALL = [name for name in MODELS if "test" in name]
PLAIN = [name for name in SMALL if name.startswith("vit")]
STAGES = [name for name in SMALL if name not in PLAIN]


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@pytest.mark.parametrize(("name", "mixer", "params"), [
    ("vit_kb_tiny_patch16_224", None, 5_717_416), ("vit_kb_small_patch16_224", None, 22_050_664),
    ("vit_kb_base_patch16_224", None, 86_567_656), ("swin_kb_tiny_patch4_window7_224", None, 28_288_354),
    ("swin_kb_small_patch4_window7_224", None, 49_606_258), ("swin_kb_base_patch4_window7_224", None, 87_768_224),
    ("dwnet_tiny", None, 24_172_744), ("dwnet_tiny", "ddwconv", 51_131_752), ("dwnet_tiny", "iddwconv", 26_243_176),
    ("vit_dwsa_small_patch16_224", None, 20_253_040),
])  # fmt: skip
def test_sizes_are_exact(name: str, mixer: str | None, params: int) -> None:
    with torch.device("meta"):
        model = make(name) if mixer is None else make(name, mixer=mixer)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_ours_alone_and_listed(name: str) -> None:
    assert timm.is_model(name) and timm.list_models(name) == [name]
    assert getattr(models, name).__module__ == "kernelbank.models"
    assert not name.startswith(("vit_dwee", "vit_dpwee", "mixer_"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("text", ["activation=relu,count", "own"])
def test_forward_head_and_gradients(name: str, text: str) -> None:
    options = {} if text == "own" else {"mixer": f"vit {text}"}
    model = make(name, num_classes=5, in_chans=1, drop_path_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1, **options)
    x = torch.randn(2, 1, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_pruning_and_features(name: str) -> None:
    model, x = make(name).eval(), torch.randn(2, 3, 64, 64)
    count = len(model.feature_info)
    final, every = model.forward_intermediates(x)
    assert len(every) == count and torch.equal(final, model.forward_features(x))
    extractor = make(name, features_only=True, out_indices=(0, count - 1)).eval()
    for level, channels, reduction in zip(
        extractor(x), extractor.feature_info.channels(), extractor.feature_info.reduction(), strict=True
    ):
        level = level if name in PLAIN else level.permute(0, 3, 1, 2)  # as timm's Swin: NHWC
        assert level.shape[1:] == (channels, 64 // reduction, 64 // reduction)
    if name in PLAIN:
        (last,) = model.get_intermediate_layers(x, 1, reshape=True)
        assert torch.equal(last, every[-1])
    assert model.prune_intermediate_layers(1) == [count - 1]
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True, indices=[0])[0], every[0])


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, x = make(name, num_classes=2, drop_path_rate=0.0).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert all(torch.allclose(*pair, atol=1e-12) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_weight_decay_and_layer_decay_groups(name: str) -> None:
    model = make(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for pname, parameter in model.named_parameters():
        free = parameter.ndim < 2 or ".table." in pname or pname in ("pos_embed", "cls_token")
        assert bool(decayed[id(parameter)]) != free, pname
    named = dict(model.named_parameters())
    assert scale[id(named["patch_embed.proj.weight"])] < min(
        scale[id(p)] for pname, p in named.items() if "attn" in pname
    )


@pytest.mark.parametrize("name", SMALL)
def test_fx_traces_mixers_as_calls_and_is_bit_equal(name: str) -> None:
    model, x = make(name, num_classes=2).eval(), torch.randn(1, 3, 64, 64)
    tracing = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
    }
    head = "head" if name in PLAIN else "head.fc"
    traced = create_feature_extractor(model, eval_return_nodes={head: "y"}, train_return_nodes={head: "y"},
                                      tracer_kwargs=tracing, suppress_diff_warning=True)  # fmt: skip
    assert torch.equal(traced(x)["y"], model(x))


@pytest.mark.parametrize("name", SMALL)
def test_the_meta_device_holds_and_then_becomes_the_model(name: str) -> None:
    with torch.device("meta"):
        model = make(name)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    there = make(name).eval()
    model.load_state_dict(there.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), there(x))


@pytest.mark.parametrize("row", ROWS)
def test_shapes_and_operations_are_counted_on_the_meta_device(row: str) -> None:
    with torch.device("meta"):
        model = make("swin_kb_test_patch4_window7_64", mixer=row, embed_dim=32, num_heads=(2, 4, 8, 16)).eval()
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(("name", "mixer"), [
    ("vit_kb_test_patch16_64", "vit activation=relu,count position=relative"), ("vit_dwsa_test_patch16_64", "dwsa"),
    ("swin_kb_test_patch4_window7_64", "dwnet | dwnet | swin | swin activation=layernorm,count"),
])  # fmt: skip
def test_saved_and_reloaded_with_its_specs(name: str, mixer: str, tmp_path: Path) -> None:
    model = make(name, mixer=mixer, mlp="ffn activation=relu", num_classes=4).eval()
    model.set_input_size((96, 64))
    x = torch.randn(1, 3, 96, 64)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [b.attn.spec for b in blocks(again)] == [b.attn.spec for b in blocks(model)]
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(("name", "options"), [
    ("vit_dwsa_test_patch16_64", {}), ("vit_dwsa_test_patch16_64", {"class_token": True, "reg_tokens": 2}),
    ("vit_linformer_test_patch16_64", {}), ("swin_kb_test_patch4_window7_64", {}),
    ("vit_linformer_test_patch16_64", {"mixer": "linformer bank=dynamic(stride=2) mix=project(4)"}),
    ("swin_kb_test_patch4_window7_64", {"mixer": "linformer mix=project(3) | dwsa | swin | swin"}),
])  # fmt: skip
@pytest.mark.parametrize(("old", "new"), [((64, 64), (96, 128)), ((128, 64), (64, 128)), ((64, 64), (32, 32))])
def test_a_checkpoint_of_another_resolution_is_resampled_as_a_resized_model(
    name: str, options: dict, old: tuple[int, int], new: tuple[int, int], tmp_path: Path
) -> None:
    model = make(name, img_size=old, **options).eval()
    save_for_hf(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=new).eval()
    model.set_input_size(new)
    x = torch.randn(1, 3, *new)
    assert torch.allclose(other(x), model(x), atol=1e-5)


def test_a_bare_checkpoint_says_its_grid_by_its_shapes(tmp_path: Path) -> None:
    model = make("vit_dwsa_test_patch16_64", img_size=96).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = make("vit_dwsa_test_patch16_64", img_size=48, checkpoint_path="")
    other.load_state_dict(models.checkpoint_filter_fn(torch.load(tmp_path / "weights.pth", weights_only=True), other))
    model.set_input_size((48, 48))
    x = torch.randn(1, 3, 48, 48)
    assert torch.allclose(other.eval()(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*non-(contiguous|tuple)")  # timm's own resizing
def test_timms_swin_of_another_window_is_resampled() -> None:
    options = {"img_size": 64, "embed_dim": 12, "depths": (1, 2), "num_heads": (2, 4)}
    stock = timm.models.SwinTransformer(**options, window_size=4).eval()
    ours = make("swin_kb_test_patch4_window7_64", **options, window_size=8).eval()
    ours.load_state_dict(models.checkpoint_filter_fn(stock.state_dict(), ours))
    stock.set_input_size(window_size=8)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(ours(x), stock(x), atol=1e-5)


def test_windows_that_were_changed_are_saved(tmp_path: Path) -> None:
    model = make("swin_kb_test_patch4_window7_64", img_size=128).eval()
    model.set_input_size((64, 96), window_size=5)
    replace_mixers(model, "activation=relu,count support=window(4, alternate) | bias=True | bias=True | bias=True")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(again(x), model(x))
    assert [stage.blocks[0].attn.spec.support.M for stage in again.layers] == [4, 5, 5, 5]


def test_stock_weights_load_strictly() -> None:
    options = {"img_size": 64, "embed_dim": 48, "num_classes": 5}
    for stock, ours in (
        (timm.models.VisionTransformer(depth=2, num_heads=3, qk_norm=True, reg_tokens=2, init_values=0.1, **options),
         models.PlainBackbone(depth=2, num_heads=3, qk_norm=True, reg_tokens=2, init_values=0.1, **options)),
        (timm.models.SwinTransformer(depths=(1, 2), num_heads=(3, 6), window_size=4, **options),
         models.HierarchicalBackbone(depths=(1, 2), num_heads=(3, 6), window_size=4, **options)),
    ):  # fmt: skip
        ours.load_state_dict(stock.state_dict())
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        assert torch.allclose(ours.double().eval()(x), stock.double().eval()(x), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SMALL])
def test_the_large_ones_build_in_two_seconds_and_run(name: str) -> None:
    start = time.perf_counter()
    model = make(name).eval()
    assert time.perf_counter() - start < 2
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).isfinite().all()


def test_the_modules_own_list_holds_nothing_else() -> None:
    assert set(models.__all__) == set(MODELS)


BAD = {
    "image": (lambda: make("vit_kb_test_patch16_64", img_size=65), r"invalid img_size=\(65, 65\); expected sides"),
    "record": (lambda: make("vit_kb_test_patch16_64", mixer="vitt"), "did you mean 'vit'"),
    "stages": (lambda: make("swin_kb_test_patch4_window7_64", mixer="swin | swin"), "expected 1 or 4 specs"),
    "said by the spec": (lambda: make("vit_kb_test_patch16_64", mlp_ratio=3), "invalid mlp_ratio=3: a spec"),
    "attention dropout": (lambda: make("vit_dwsa_test_patch16_64", attn_drop_rate=0.1), "invalid attn_drop=0.1"),
    "qk_norm": (lambda: make("vit_dwsa_test_patch16_64", qk_norm=True), "invalid qk_norm=True for dwsa"),
    "windows": (lambda: make("swin_kb_test_patch4_window7_64", window_size=((4, 8),) * 4), "expected square windows"),
    "heads": (lambda: make("swin_kb_test_patch4_window7_64", num_heads=(1, 2)), "expected one for each stage"),
    "resize": (lambda: make("vit_kb_test_patch16_64").set_input_size((60, 64)), r"invalid img_size=\(60, 64\)"),
    "resize stages": (lambda: make("dwnet_test").set_input_size((66, 64)), r"invalid img_size=\(66, 64\)"),
    "init": (lambda: make("vit_kb_test_patch16_64", weight_init="jax"), "invalid weight_init='jax'"),
    "fix_init": (lambda: make("vit_kb_test_patch16_64", fix_init=True), "invalid fix_init=True"),
    "a record that is no text": (lambda: make("vit_kb_test_patch16_64", mixer=5), "invalid spec 5; expected text"),
    "windows of three stages": (lambda: make("dwnet_test", window_size=(7, 7, 7)), r"invalid window_size=\(7, 7, 7\)"),
    "image of three sides": (lambda: make("vit_kb_test_patch16_64", img_size=(32, 32, 3)), r"img_size=\(32, 32, 3\)"),
    "patch": (lambda: make("vit_kb_test_patch16_64", patch_size=0), r"invalid patch_size=\(0, 0\)"),
    "a number of heads": (lambda: make("dwnet_test", num_heads=3), "invalid num_heads=3"),
    "depth": (lambda: make("vit_kb_test_patch16_64", depth=-1), "invalid depth=-1"),
    "a stage without blocks": (lambda: make("dwnet_test", depths=(1, 0, 1, 1)), r"invalid depths\[1\]=0"),
    "dropped patches": (lambda: make("vit_kb_test_patch16_64", patch_drop_rate=0.5), "patch_drop_rate=0.5"),
    "partition": (lambda: make("dwnet_test").set_input_size((64, 64), always_partition=True), "always_partition"),
}  # fmt: skip


def test_a_refused_resize_leaves_the_model() -> None:
    model, x = make("swin_kb_test_patch4_window7_64").eval(), torch.randn(1, 3, 64, 64)
    before = model(x)
    for arguments in ({"window_size": (4, 8)}, {"img_size": (66, 64)}, {"window_size": (7, 7, 7)}):
        with pytest.raises(SpecError):
            model.set_input_size(**({"img_size": (128, 128)} | arguments))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(call: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()
