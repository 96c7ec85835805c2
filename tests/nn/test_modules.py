"""The linear layers of mixers are nn.Linear that other tools reach: LoRA, hooks, pruning, parametrisation and
quantisation; torch.fx; and what timm asks of a model: masks and weight decay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import timm
import torch
from equality import normal
from timm.models import FeatureGraphNet
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor

import kernelbank.models
from kernelbank import Mixer, accelerate, replace_mixers, use_path
from kernelbank.atlas import ROWS
from kernelbank.nn.block import narrowed
from kernelbank.nn.dynamic_conv import DynamicConv2d
from kernelbank.nn.linears import is_plain
from kernelbank.spec import MixerSpec, SpecError

LINEARS = ["q", "key", "value", "out"]
TEXTS = {"swin": "swin support=window(2, 1)"}
NAMED = ("vit_kb_test_patch16_64", "swin_kb_test_patch4_window7_64", "dwnet_test")


class Plus(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def tokens(mixer: Mixer, batch: int = 2) -> Tensor:
    count = mixer.prefix + mixer.grid[0] * mixer.grid[1]
    return normal(batch, count, mixer.dim, seed=1, dtype=torch.float32)


def equal_to_defined(mixer: Mixer, weights: dict[str, Tensor]) -> bool:
    """Whether a mixer computes what a fresh one with these weights computes."""
    fresh = Mixer(mixer.spec, mixer.dim, mixer.num_heads, mixer.grid, prefix=mixer.prefix).eval()
    fresh.load_state_dict({**fresh.state_dict(), **weights})
    x = tokens(mixer)
    with torch.no_grad():
        return torch.allclose(mixer.eval()(x), fresh(x), atol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_every_linear_layer_is_a_plain_linear_with_its_tensors(row: str) -> None:
    mixer = Mixer(MixerSpec.parse(TEXTS.get(row, row)).at_block(0), 32, 2, (4, 4))
    assert all(is_plain(mixer.get_submodule(name)) for name in mixer.linears)
    assert set(mixer.state_dict()) == {entry.name for entry in mixer.entries}
    assert ("q" in mixer.linears) == (mixer.spec.frame != "bare")


@pytest.mark.parametrize("row", ROWS)
def test_hooks_on_any_linear_layer_take_part(row: str) -> None:
    """A hook on each layer in turn changes the output as adding to its bias does, on every row that has it."""
    mixer = Mixer(MixerSpec.parse(TEXTS.get(row, row)).at_block(0), 32, 2, (4, 4)).eval()
    x = tokens(mixer)
    for name in mixer.linears:
        layer = mixer.get_submodule(name)
        seen: list[int] = []
        handle = layer.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.numel()) or y + 0.5)
        with torch.no_grad():
            hooked = mixer(x)
        handle.remove()
        assert seen, name
        if layer.bias is None:
            continue
        with torch.no_grad():
            layer.bias += 0.5
            shifted = mixer(x)
            layer.bias -= 0.5
        assert torch.allclose(hooked, shifted, atol=1e-5), name


@pytest.mark.parametrize(("row", "targets"), [
    ("vit", ["q", "value"]), ("vit", LINEARS), ("dwsa", ["q", "key", "out"]), ("relu_attention", LINEARS),
    ("ffn", ["key", "value"]), ("swin", LINEARS), ("ddwconv", ["reduce", "key"]),
])  # fmt: skip
def test_lora_trains_and_merges(row: str, targets: list[str]) -> None:
    """PEFT's adapter on a mixer: a step moves its parameters alone, and merging leaves plain layers with the sum."""
    torch.manual_seed(0)
    mixer = Mixer(MixerSpec.parse(TEXTS.get(row, row)).at_block(0), 16, 2, (4, 4))
    x, before = tokens(mixer), {name: t.clone() for name, t in mixer.tensors().items()}
    # eval: BatchNorm's statistics are not the adapter's
    adapted = peft.get_peft_model(mixer, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets) and all("lora_" in name for name in trained)
    optimiser = torch.optim.SGD(adapted.parameters(), 0.01)
    adapted(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in adapted.named_parameters() if n in trained)
    optimiser.step()
    deltas = {f"{name}.weight": adapted.base_model.model.get_submodule(name).get_delta_weight("default")
              for name in targets}  # fmt: skip
    with torch.no_grad():
        y = adapted(x)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(x), y, atol=1e-5)
    assert type(merged) is Mixer and all(is_plain(merged.get_submodule(name)) for name in merged.linears)
    assert equal_to_defined(merged, {name: before[name] + deltas[name].detach() for name in deltas} | {
        name: before[name] for name in before if name not in deltas})  # fmt: skip


def test_lora_on_a_backbone_reaches_every_block() -> None:
    model = timm.create_model(NAMED[0], num_classes=3).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["head"]))
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in adapted.modules()) >= 6 * len(model.blocks)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(adapted.merge_and_unload()(x), adapted(x), atol=1e-5)


@pytest.mark.parametrize("targets", [["q", "value"], "all-linear"])
def test_lora_trains_a_vit_with_relu_attention(targets: list[str] | str) -> None:
    """The loss falls, nothing but the adapters changes, and merged, unloaded layers compute what the adapters did."""
    torch.manual_seed(0)
    model = timm.create_model(NAMED[0], mixer="relu_attention", num_classes=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 3
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.02, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(adapted(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(images)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(images), expected, rtol=1e-4, atol=1e-5)
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(images), expected, rtol=1e-4, atol=1e-5)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-5)
    layers = [m for m in merged.blocks.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 6 * len(merged.blocks) and all(map(is_plain, layers))


@pytest.mark.parametrize("row", ["vit", "ffn"])
def test_each_hook_runs_once_per_forward_and_backward(row: str) -> None:
    mixer, calls = Mixer(row, 16, 2, (4, 4)), []
    for name in mixer.linears:
        layer = mixer.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(f"pre {name}"))
        layer.register_forward_hook(lambda *_, name=name: calls.append(f"forward {name}"))
        layer.register_full_backward_hook(lambda *_, name=name: calls.append(f"backward {name}"))
    mixer(torch.randn(2, 16, 16, requires_grad=True)).sum().backward()
    kinds = ("pre", "forward", "backward")
    assert sorted(calls) == sorted(f"{kind} {name}" for kind in kinds for name in mixer.linears)


def test_hooks_for_every_module_see_the_linear_layers() -> None:
    mixer, layers = Mixer("vit", 16, 2, (4, 4)), []
    handle = register_module_forward_pre_hook(lambda module, _: layers.append(module))
    try:
        mixer(torch.randn(1, 16, 16))
    finally:
        handle.remove()
    assert [m for m in layers if type(m) is nn.Linear] == [mixer.q, mixer.key, mixer.value, mixer.out]
    layers.clear()
    mixer(torch.randn(1, 16, 16))
    assert not layers


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("row", ["relu_attention", "ffn", "ddwconv", "dconv", "swin"])
@pytest.mark.parametrize("norm", [
    nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm,
    nn.utils.parametrizations.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
], ids=["old weight norm", "weight norm", "old spectral norm", "spectral norm", "pruning"])  # fmt: skip
def test_normed_and_pruned_layers_follow_training(row: str, norm: Callable[[nn.Module], nn.Module]) -> None:
    """After a step the mixer computes what a fresh one with the layer's present weight computes."""
    torch.manual_seed(0)
    mixer = Mixer(MixerSpec.parse(TEXTS.get(row, row)).at_block(0), 16, 2, (4, 4), dtype=torch.float64)
    name = mixer.linears[-1] if row == "dconv" else "key"
    norm(mixer.get_submodule(name))
    optimiser = torch.optim.SGD(mixer.parameters(), 0.1)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    mixer(x).square().sum().backward()
    optimiser.step()
    mixer.eval()
    with torch.no_grad():
        y = mixer(x)
        fresh = Mixer(mixer.spec, 16, 2, (4, 4), dtype=torch.float64).eval()
        fresh.load_state_dict({key: tensor.detach().clone() for key, tensor in mixer.tensors().items()})
        torch.testing.assert_close(y, fresh(x))


def test_tensors_that_are_no_layer_can_be_pruned() -> None:
    """A table, and the keys of several heads, are no layers: their mask too follows every step."""
    for text, name in (("vit_relpos", "table"), ("ffn kernel=two_step(2)", "key")):
        mixer, x = Mixer(text, 16, 2, (4, 4)), torch.randn(2, 16, 16)
        holder = mixer.get_submodule(name)
        prune.l1_unstructured(holder, "weight", 0.5)
        mixer(x).square().sum().backward()
        torch.optim.SGD(mixer.parameters(), 0.5).step()
        y = mixer(x)
        masked = holder.weight_orig * holder.weight_mask
        assert torch.equal(mixer.tensors()[f"{name}.weight"], masked)
        prune.remove(holder, "weight")
        torch.testing.assert_close(mixer(x), y)


@pytest.mark.parametrize(("text", "name"), [("dconv", "predict"), ("condconv", "predict"), ("ddwconv", "key"),
                                            ("ddwconv", "reduce")])  # fmt: skip
def test_layers_of_a_dynamic_convolution_are_called(text: str, name: str) -> None:
    module = DynamicConv2d(text, 8, 8, padding=1)
    x, calls = torch.randn(2, 8, 6, 6), []
    layer = module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(name))
    y = module(x)
    assert calls == [name]
    handle.remove()
    torch.testing.assert_close(module(x), y)
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)).eval()
    adapted(x).sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    y = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


def test_accelerate_leaves_the_layers_of_a_mixer_plain() -> None:
    model = timm.create_model(NAMED[0]).eval()
    handle = accelerate(model)
    assert all(is_plain(m.get_submodule(n)) for m in model.modules() if isinstance(m, Mixer) for n in m.linears)
    assert len(handle) == 1  # the head


def test_pruned_weights_follow_every_step() -> None:
    mixer, x = Mixer("vit", 16, 2, (4, 4)), torch.randn(2, 16, 16)
    prune.l1_unstructured(mixer.q, "weight", 0.5)
    optimiser = torch.optim.SGD(mixer.parameters(), 0.5)
    mixer(x).square().sum().backward()
    optimiser.step()
    mixer(x)
    assert torch.equal(mixer.tensors()["q.weight"], mixer.q.weight_orig * mixer.q.weight_mask)


@pytest.mark.parametrize("adapt", [
    lambda mixer: parametrize.register_parametrization(mixer.key, "weight", Plus()),
    lambda mixer: nn.utils.parametrizations.weight_norm(mixer.key),
    lambda mixer: setattr(mixer.key, "forward", lambda x: x),
    lambda mixer: setattr(mixer, "key", nn.Sequential(nn.Linear(16, 16))),
], ids=["parametrised", "weight norm", "own forward", "another module"])  # fmt: skip
def test_a_changed_layer_is_called_and_not_carried(adapt: Callable[[Mixer], object]) -> None:
    mixer = Mixer("relu_attention", 16, 2, (4, 4)).eval()
    adapt(mixer)
    x, called = torch.randn(2, 16, 16), []
    mixer.key.register_forward_hook(lambda *_: called.append(True))
    mixer(x).sum().backward()
    assert called
    with pytest.raises(SpecError, match="invalid key, an adapted, hooked or parametrised"):
        from kernelbank.nn.edit.carry import carry

        carry(mixer, MixerSpec.parse("vit"))


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning", "ignore:.*deprecated:DeprecationWarning")
def test_dynamic_quantisation_runs() -> None:
    mixer = Mixer("vit", 32, 2, (4, 4)).eval()
    x = tokens(mixer)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(mixer), {nn.Linear}, torch.qint8)
    assert type(quantised.q) is not nn.Linear
    assert quantised.tensors() == {}  # its weights are methods
    with torch.no_grad():
        assert torch.allclose(quantised(x), mixer(x), atol=0.02)
    backbone = timm.create_model(NAMED[0]).eval()
    image = torch.randn(1, 3, 64, 64)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(backbone), {nn.Linear}, torch.qint8)
    with torch.no_grad():
        assert torch.allclose(quantised(image), backbone(image), atol=0.05)


def test_a_forced_path_that_reads_a_hooked_layer_says_so() -> None:
    mixer = Mixer("ffn", 16, 2, (4, 4))
    mixer.key.register_forward_hook(lambda *_: None)
    with use_path("reference"), pytest.raises(ValueError, match="reads the weights of key"):
        mixer(torch.randn(1, 16, 16))


# ---- torch.fx and timm -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained:UserWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", [*NAMED, "stock ViT", "stock Swin"])
def test_fx_traces_the_model(name: str) -> None:
    if name in NAMED:
        model = timm.create_model(name).eval()
    else:
        stock = "vit_tiny_patch16_224" if name == "stock ViT" else "swin_tiny_patch4_window7_224"
        sizes: dict[str, Any] = {"depths": (1, 1, 1, 1)} if "Swin" in name else {"depth": 2}
        model = replace_mixers(timm.create_model(stock, img_size=64, **sizes), "activation=relu,count").eval()
    node = "blocks.1" if hasattr(model, "blocks") else "layers.1"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
        (features,) = create_feature_extractor(model, [node])(torch.cat([x, x])).values()
        (mapped,) = FeatureGraphNet(model, (1,))(torch.cat([x, x]))
    assert features.shape[0] == 2 and torch.equal(features, mapped)


@pytest.mark.parametrize("row", ["vit", "swin support=window(2, 1)", "dwsa", "ffn", "involution"])
def test_fx_traces_a_mixer_alone(row: str) -> None:
    """A mixer is one call of the graph, and its parameters are those of the traced module."""
    mixer, x = Mixer(row, 16, 2, (4, 4)).eval(), torch.randn(2, 16, 16)
    traced = torch.fx.symbolic_trace(mixer)
    assert torch.equal(traced(x), mixer(x)) and torch.equal(traced(x[:1]), mixer(x[:1]))
    assert {id(p) for p in traced.parameters()} == {id(p) for p in mixer.parameters()}
    again = pickle.loads(pickle.dumps(copy.deepcopy(traced)))
    assert torch.equal(again(x), mixer(x))
    traced(x).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    inside = torch.fx.symbolic_trace(nn.Sequential(mixer, nn.ReLU()))
    assert torch.equal(inside(x), mixer(x).relu()) and inside.state_dict().keys() == {f"0.{key}" for key in
                                                                                      mixer.state_dict()}  # fmt: skip


def test_fx_traces_the_attention_of_a_stock_model_and_a_convolution_alone() -> None:
    block = replace_mixers(timm.create_model("test_vit"), "activation=relu,count").eval().blocks[0]
    x = torch.randn(2, block.attn.prefix + 100, block.attn.dim)
    assert torch.equal(torch.fx.symbolic_trace(block.attn)(x), block.attn(x))
    conv, image = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), "dconv"), torch.randn(2, 4, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(conv)(image), conv(image))


@pytest.mark.parametrize("stock", ["swin_tiny_patch4_window7_224", "test_vit"])
def test_tables_are_not_decayed_in_a_stock_model(stock: str) -> None:
    """timm's Swin leaves its tables out of weight decay, and so does a mixer in its place."""
    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1)} if "swin" in stock else {}
    model = timm.create_model(stock, **sizes)
    before = model.no_weight_decay()
    replace_mixers(model, "activation=relu,count position=relative")
    model = copy.deepcopy(model)
    assert {n for n in model.no_weight_decay() if "table" not in n} == {n for n in before if "table" not in n}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    tables = [(n, p) for n, p in model.named_parameters() if "table" in n]
    assert tables and not [n for n, p in tables if id(p) in decayed]


@pytest.mark.parametrize("row", ["vit", "relu_attention", "swin support=window(2, 1)", "dwsa"])
def test_masks_that_timm_takes(row: str) -> None:
    """Key padding and additive masks equal the boolean mask of queries and kernels that they mean."""
    mixer = Mixer(row, 16, 2, (4, 4)).eval()
    x, seen = torch.randn(3, 16, 16), torch.rand(3, 16) > 0.3
    full = seen[:, None, None].expand(3, 1, 16, 16)
    with torch.no_grad():
        defined = mixer(x, attn_mask=full)
        for mask in (seen, seen[:, None, None], full[:, 0], torch.zeros(3, 16).masked_fill(~seen, -torch.inf)):
            assert torch.equal(mixer(x, attn_mask=mask), defined), mask.shape


@pytest.mark.parametrize("additive", [False, True])
def test_causal_and_key_padding_masks_combine(additive: bool) -> None:
    x, padding = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)
    mask = torch.zeros(2, 5).masked_fill(~padding, -torch.inf) if additive else padding
    expected = torch.ones(5, 5, dtype=torch.bool).tril() & padding[:, None, None]
    combined = narrowed(x, mask, True)
    assert combined is not None and torch.equal(combined.expand(2, 1, 5, 5), expected)
    assert narrowed(x, None, False) is None


def test_a_mask_of_two_axes_that_could_be_either_is_an_error() -> None:
    """For a batch of T images a mask (T, T) is one of queries and kernels, or one of images and kernels."""
    mixer, mask = Mixer("vit", 16, 2, (2, 2)).eval(), torch.ones(4, 4, dtype=torch.bool).tril()
    x = torch.randn(4, 4, 16)
    with pytest.raises(SpecError, match=r"expected \(1, 4, 4\) or \(4, 1, 1, 4\)"):
        mixer(x, attn_mask=mask)
    queries, padding = mixer(x, attn_mask=mask[None]), mixer(x, attn_mask=mask[:, None, None])
    assert not torch.allclose(queries, padding)
    assert torch.allclose(mixer(x[:3], attn_mask=mask), queries[:3], atol=1e-6)
    assert torch.allclose(torch.cat([mixer(x[:3], attn_mask=mask[:3]), mixer(x[3:], attn_mask=mask[3:])]), padding,
                          atol=1e-6)  # fmt: skip
    assert torch.equal(narrowed(x, None, True), mask[None])  # type: ignore[arg-type]  # a causal mask is never meant otherwise
    mixer(x[:1, :1], (1, 1), attn_mask=mask[:1, :1])  # both readings are one


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("row", ["vit", "relu_attention", "swin support=window(2, 1)"])
def test_additive_masks_in_a_compiled_mixer(row: str, backend: str) -> None:
    torch._dynamo.reset()
    mixer, x = Mixer(row, 16, 2, (4, 4)).eval(), torch.randn(3, 16, 16)
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    causal = torch.zeros(16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    for mask in (causal, torch.zeros(3, 16).masked_fill(torch.rand(3, 16) < 0.3, -torch.inf)):
        assert torch.allclose(compiled(x, attn_mask=mask), mixer(x, attn_mask=mask == 0), atol=1e-6)
    with pytest.raises(RuntimeError, match="values other than 0 and -inf"):
        compiled(x, attn_mask=causal.clamp(min=-1e4))
    torch._dynamo.reset()


def test_additive_masks_in_an_exported_mixer_and_under_vmap() -> None:
    mixer, x = Mixer("vit", 16, 2, (4, 4)).eval(), torch.randn(3, 16, 16)
    causal = torch.zeros(16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    exported = torch.export.export(mixer, (x,), {"attn_mask": causal}).module()
    assert torch.allclose(exported(x, attn_mask=causal), mixer(x, attn_mask=causal), atol=1e-6)
    with pytest.raises(RuntimeError, match="values other than 0 and -inf"):
        exported(x, attn_mask=causal - 1)

    def masked(image: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = mixer(image[None], attn_mask=mask)[0]
        return out

    masks = torch.stack([causal, causal.mT, torch.zeros(16, 16)])
    assert torch.allclose(torch.func.vmap(masked)(x, masks), mixer(x, attn_mask=masks), atol=1e-6)
    with pytest.raises(SpecError, match="values other than 0 and -inf"):
        torch.func.vmap(masked)(x, masks.clamp(min=-1e4))


@pytest.mark.parametrize(("mask", "message"), [
    (torch.full((16, 16), -1e4), "values other than 0 and -inf"),
    (torch.ones(16, 16, dtype=torch.int64), "expected bool"),
    (torch.ones(2, 2, 16, 16, dtype=torch.bool), "a mask per head is not supported"),
    (torch.ones(3, 16, dtype=torch.bool), r"invalid attn_mask of shape \(3, 16\)"),
])  # fmt: skip
def test_other_masks_are_errors(mask: Tensor, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Mixer("vit", 16, 2, (4, 4))(torch.randn(2, 16, 16), attn_mask=mask)


@pytest.mark.parametrize("text", ["activation=relu,count", "position=relative"])
def test_weight_decay_of_a_replaced_model_survives_pickling(text: str) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    again = pickle.loads(pickle.dumps(replace_mixers(model, text)))
    assert again.no_weight_decay() == model.no_weight_decay() != set()


assert kernelbank.models is not None
