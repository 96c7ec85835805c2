"""DynamicConv2d: equal to a loop over images and experts, to public code, and to the convolution it starts as."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import CondConv2d, Conv2dSame
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from kernelbank import SpecError
from kernelbank.nn.dynamic_conv import DynamicConv2d
from kernelbank.spec.axes import Dynamic, Pool, Static
from kernelbank.spec.inventory import inventory

TEXTS = (
    "dconv",
    "dconv bank=static(3) mix=predict(softmax, tau=30)",
    "dconv bias=False",
    "condconv",
    "condconv bank=static(3) mix=predict(sigmoid, tau=2, r=2)",
    "ddwconv",
    "ddwconv bank=dynamic",
    "ddwconv bank=dynamic(2, stride=2) mix=mean",
)
GENERATED = {text for text in TEXTS if text.startswith("ddwconv")}
DOUBLE = torch.float64


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool(((a - b).detach().abs() <= tolerance * (1 + b.detach().abs().max())).all())


@st.composite
def convolutions(draw: st.DrawFn, text: str) -> nn.Conv2d:
    """A convolution that `text` can state: every stride, padding, dilation, group, mode and bias."""
    groups, of, out = (draw(st.sampled_from(options)) for options in ((1, 2, 3), (1, 2), (1, 2)))
    if text in GENERATED:
        groups, of, out = draw(st.sampled_from((2, 5))), 1, 1
    size, dilation = draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 2, (2, 1))))
    shared = {"groups": groups, "dilation": dilation, "bias": draw(st.booleans()), "dtype": DOUBLE}
    stride = draw(st.sampled_from((1, 2, (2, 3))))
    if draw(st.integers(0, 3)) == 0:
        return Conv2dSame(groups * of, groups * out, size, stride=stride, **shared)
    padding = draw(st.sampled_from((0, 1, (0, 2), "valid", *(("same",) if stride == 1 else ()))))
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    return nn.Conv2d(groups * of, groups * out, size, stride, padding, padding_mode=mode, **shared)


def gradients(y: Tensor, upstream: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad((y * upstream).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


# ---- the equation ----------------------------------------------------------------------------------------


def literal(module: DynamicConv2d, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """One image, one expert, one equation at a time; `conv` only applies a kernel."""
    p, spec = dict(module.named_parameters()), module.spec
    outputs = []
    for image in x:
        pooled, bias = image.mean((1, 2)), p.get("bias")
        if isinstance(spec.bank, Static):
            hidden = pooled
            if spec.mix.r is not None:
                hidden = F.relu(F.linear(hidden, p["reduce.weight"], p.get("reduce.bias")))
            z = F.linear(hidden, p["predict.weight"], p.get("predict.bias"))
            z = z / (module.temperature if module.training and module.temperature else spec.mix.tau)
            total = z.exp().sum()
            pi = [e.exp() / total if spec.mix.gate == "softmax" else 1 / (1 + (-e).exp()) for e in z]
            weight = sum(c * w for c, w in zip(pi, p["weight"], strict=True))
            bias = None if bias is None else sum(c * b for c, b in zip(pi, bias, strict=True))
        else:
            assert isinstance(spec.bank, Dynamic)
            s, (C, H, W) = spec.bank.stride, image.shape
            cells = [image[:, a : a + s, b : b + s].mean((1, 2)) for a in range(0, H, s) for b in range(0, W, s)]
            features = [sum(cells) / len(cells)] if isinstance(spec.mix, Pool) else cells
            made = []
            for feature in features:
                hidden = feature
                if spec.bank.r is not None:
                    hidden = F.relu(F.linear(hidden, p["reduce.weight"], p["reduce.bias"]))
                made.append(F.linear(hidden, p["key.weight"], p["key.bias"]).view(C, 1, spec.size, spec.size))
            weight = sum(made) / len(made)
        held = {"weight": weight} | ({} if bias is None else {"bias": bias})
        outputs.append(functional_call(conv, held, (image[None],)))
    return torch.cat(outputs)


@settings(max_examples=150)
@given(st.data(), st.sampled_from(TEXTS))
def test_a_loop_over_images_in_float64_with_every_gradient(data: st.DataObject, text: str) -> None:
    conv = data.draw(convolutions(text))
    module = DynamicConv2d.from_conv(conv, text)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    module.temperature = data.draw(st.sampled_from((None, 3.0)))
    module.train(data.draw(st.booleans()))
    batch, high, wide = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (9, 12), (9, 12)))
    x = torch.randn(batch, conv.in_channels, high, wide, dtype=DOUBLE, requires_grad=True)
    y, expected = module(x), literal(module, conv, x)
    assert close(y, expected)
    wanted, upstream = [x, *module.parameters()], torch.randn_like(y)
    for ours, theirs in zip(gradients(y, upstream, wanted), gradients(expected, upstream, wanted), strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 1, 7), (3, 4, 5, 3)])
@pytest.mark.parametrize("text", TEXTS)
def test_small_and_odd_images(text: str, shape: tuple[int, ...]) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, dtype=DOUBLE)
    module, x = DynamicConv2d.from_conv(conv, text), torch.randn(shape, dtype=DOUBLE)
    assert close(module(x), literal(module, conv, x))
    assert close(module(x), conv(x))


@pytest.mark.parametrize("text", TEXTS)
def test_an_empty_batch_keeps_the_shape_and_the_graph(text: str) -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, stride=2, groups=4), text)
    y = module(torch.empty(0, 4, 9, 9))
    y.sum().backward()
    assert y.shape == (0, 4, 4, 4)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("padding", [1, ""])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_timm_condconv_agrees(groups: int, padding: Any) -> None:
    theirs = CondConv2d(4, 8, 3, stride=2, padding=padding, groups=groups, bias=True, num_experts=8).double()
    routing = nn.Linear(4, 8).double()
    ours = DynamicConv2d(
        f"condconv kernel=full({groups})" if groups < 4 else "condconv_dw",
        4, 8, stride=2, padding=theirs.padding, dtype=DOUBLE,
    )  # fmt: skip
    state = {"weight": theirs.weight.view(ours.weight.shape), "bias": theirs.bias}
    ours.load_state_dict(state | {f"predict.{name}": p for name, p in routing.state_dict().items()}, strict=True)
    x = torch.randn(3, 4, 9, 8, dtype=DOUBLE, requires_grad=True)
    y, expected = ours(x), theirs(x, torch.sigmoid(routing(x.mean((2, 3)))))
    assert close(y, expected)
    upstream = torch.randn_like(y)
    mine = gradients(y, upstream, [x, ours.weight, ours.predict.weight])
    other = gradients(expected, upstream, [x, theirs.weight, routing.weight])
    assert all(close(a, b.view(a.shape)) for a, b in zip(mine, other, strict=True))


# ---- the start -------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.data(), st.sampled_from(TEXTS), st.booleans())
def test_output_is_the_convolutions_at_the_start(data: st.DataObject, text: str, training: bool) -> None:
    conv = data.draw(convolutions(text)).train(training)
    module = DynamicConv2d.from_conv(conv, text)
    module.temperature = 7.0
    x = torch.randn(3, conv.in_channels, 11, 9, dtype=DOUBLE)
    assert module.training == training and (module.bias is None) == (conv.bias is None)
    assert close(module(x), conv(x))


def distance(experts: Tensor) -> float:
    """The largest distance between two experts over the largest weight."""
    flat = experts.detach().flatten(1)
    return float(torch.cdist(flat, flat).max() / flat.abs().max())


def ten_steps(module: DynamicConv2d, equal_routing: bool = False) -> None:
    if equal_routing:
        with torch.no_grad():
            for parameter in module.predict.parameters():
                parameter.zero_()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(10):
        x = torch.randn(4, module.in_channels, 8, 8, dtype=DOUBLE)
        optimiser.zero_grad()
        (module(x) - torch.randn(4, module.out_channels, 8, 8, dtype=DOUBLE)).pow(2).mean().backward()
        optimiser.step()


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in GENERATED])
def test_experts_differ_after_ten_steps_and_not_with_equal_routing(text: str) -> None:
    """Trained from the start: every pair differs. With equal coefficients every expert has the same gradient."""
    conv = nn.Conv2d(6, 6, 3, padding=1, dtype=DOUBLE)
    module, same = (DynamicConv2d.from_conv(conv, text).train() for _ in range(2))
    assert distance(module.weight) == 0
    assert bool(module.predict.weight.any(1)[: module.weight.shape[0] // 2 * 2].all())  # non-zero routing
    ten_steps(module)
    ten_steps(same, equal_routing=True)
    flat = module.weight.detach().flatten(1)
    assert float(torch.pdist(flat).min()) > 1e-6 and distance(module.weight) > 1e-5
    assert distance(same.weight) < 1e-12
    assert distance(same.weight) < 1e-6 * distance(module.weight)


@pytest.mark.parametrize("K", [2, 3, 8])
def test_sigmoid_coefficients_sum_to_half_of_the_kernels(K: int) -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, dtype=DOUBLE), f"condconv bank=static({K})")
    pi = torch.sigmoid(module.predict(5 * torch.randn(20, 4, dtype=DOUBLE))).detach()
    assert close(pi.sum(1), torch.full((20,), K / 2, dtype=DOUBLE))
    assert float(pi[:, : K // 2 * 2].std(0).min()) > 0.1  # and they do depend on the image


def test_a_generator_learns_its_upper_layers_first() -> None:
    """The last layer has weight 0 at the start: the layer under it has no gradient in the first step, then it has."""
    module = DynamicConv2d.from_conv(nn.Conv2d(8, 8, 7, padding=3, groups=8, dtype=DOUBLE), "ddwconv")
    start, x = module.reduce.weight.detach().clone(), torch.randn(4, 8, 9, 9, dtype=DOUBLE) + 1
    optimiser, sizes = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(3):
        optimiser.zero_grad()
        module(x).pow(2).mean().backward()
        sizes.append([float(layer.weight.grad.abs().max()) for layer in (module.key, module.reduce)])
        optimiser.step()
    assert sizes[0][0] > 1e-6 and sizes[0][1] == 0
    assert sizes[1][1] > 1e-6
    assert not torch.equal(module.reduce.weight, start)
    kernels, _ = module.kernels(x)
    assert float((kernels[0] - kernels[1]).detach().abs().max()) > 1e-6  # one kernel an image


@pytest.mark.parametrize("text", ["dconv", "ddwconv"])
def test_a_bottleneck_of_one_unit_is_never_dead_at_the_start(text: str) -> None:
    """Four channels, r = 4: drawn as nn.Linear draws, half of them would pass no positive image."""
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 4, 5, 5)
    for _ in range(20):
        module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), text)
        assert module.reduce.out_features == 1
        assert float(F.relu(module.reduce(torch.ones(4))).detach()) > 0
    with torch.no_grad():
        module.get_submodule("key" if text == "ddwconv" else "predict").weight.normal_()
        if text == "dconv":
            module.weight.normal_()
        first, second = module.kernels(x)[0]
        assert float((first - second).abs().max()) > 0


def test_temperature_replaces_tau_in_training_only() -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, dtype=DOUBLE), "dconv mix=predict(softmax, tau=2)")
    with torch.no_grad():
        module.weight.normal_()
    x = torch.randn(2, 4, 5, 5, dtype=DOUBLE)
    plain = module.eval()(x)
    module.temperature = 1e6
    assert torch.equal(module(x), plain)
    mean = F.conv2d(x, module.weight.mean(0), module.bias.mean(0))
    assert close(module.train()(x), mean, 1e-4) and not close(plain, mean, 1e-2)
    module.temperature = None
    assert torch.equal(module(x), plain)
    with pytest.raises(SpecError, match="invalid temperature=0"):
        module.temperature = 0


def test_what_was_frozen_stays_frozen_and_the_routing_is_trained() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4).requires_grad_(False).eval()
    static, generated = (DynamicConv2d.from_conv(conv, text) for text in ("dconv", "ddwconv"))
    assert {n for n, p in static.named_parameters() if not p.requires_grad} == {"weight", "bias"}
    assert {n for n, p in generated.named_parameters() if not p.requires_grad} == {"key.bias", "bias"}
    assert not static.training


# ---- a module among modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dconv", "condconv_dw", "ddwconv frame=bare size=3"])
def test_names_and_shapes_are_the_inventorys(text: str) -> None:
    module = DynamicConv2d(text, 8, 8)
    listed = {entry.name: entry.shape for entry in inventory(module.spec, 8, 1, (5, 5))}
    extra = {"bias": (8,)} if text.startswith("ddwconv") else {}  # a static bias beside a generated kernel
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == listed | extra


def test_its_text_is_the_record_and_what_stands_outside_it() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
    module = DynamicConv2d.from_conv(conv, "dconv mix=predict(softmax, tau=30, r=4)")
    record = "dconv mix=predict(softmax, 30, 4) kernel=full(2)"
    assert repr(module).splitlines()[1].strip() == f"'{record}', 8, 16, stride=(2, 2), padding=(1, 1), bias=False"
    assert tuple(module.weight.shape) == (4, 16, 4, 3, 3) and module.bias is None
    assert str(module.spec) == record


@pytest.mark.parametrize("text", TEXTS)
def test_copied_pickled_reloaded(text: str) -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), text).eval()
    x = torch.randn(2, 4, 6, 6)
    other = DynamicConv2d(module.spec, 4, 4).eval()
    other.load_state_dict(module.state_dict(), strict=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(twin(x), module(x)) and str(twin.spec) == str(module.spec)


@pytest.mark.parametrize("text", TEXTS)
def test_built_on_the_meta_device(text: str) -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(4, 4, 3, groups=4)
        module = DynamicConv2d.from_conv(conv, text)
        direct = DynamicConv2d(module.spec, 4, 4)
    assert all(p.is_meta for p in [*module.parameters(), *direct.parameters()])
    module.to_empty(device="cpu").reset_parameters()
    assert bool(module(torch.randn(2, 4, 6, 6)).isfinite().all())


@pytest.mark.parametrize("text", TEXTS)
def test_channels_last_in_and_out(text: str) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, dtype=DOUBLE)
    module, x = DynamicConv2d.from_conv(conv, text), torch.randn(2, 4, 6, 5, dtype=DOUBLE)
    expected = module(x)
    module.to(memory_format=torch.channels_last)
    y = module(x.contiguous(memory_format=torch.channels_last))
    assert close(y, expected) and y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert module(x).is_contiguous()


@pytest.mark.parametrize("text", TEXTS)
def test_autocast_predicts_and_generates_in_float32(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), text), torch.randn(2, 4, 6, 6)
    expected = module(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, (weight, _) = module(x), module.kernels(x)
        assert y.dtype == torch.bfloat16 and weight.dtype == torch.float32
        assert torch.allclose(weight, module.kernels(x.bfloat16())[0], atol=1e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    assert torch.allclose(y.float(), expected, atol=0.05)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["dconv", "condconv", "ddwconv"])
def test_compiles_whole_and_exports(text: str) -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, groups=4), text).eval()
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
    torch._dynamo.reset()
    assert torch.allclose(torch.export.export(module, (x,)).module()(x), module(x), atol=1e-6)


def test_a_leaf_of_fx_at_any_depth() -> None:
    module = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), "dconv")
    net, x = nn.Sequential(nn.Sequential(module), nn.ReLU()), torch.randn(2, 4, 6, 6)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x)) and traced.state_dict().keys() == net.state_dict().keys()
    traced(x[:1, :, :5]).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_pruned_and_parametrised_weights_are_what_they_compute_to() -> None:
    module, x = DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), "dconv"), torch.randn(2, 4, 6, 6)
    before = module(x)
    parametrizations.weight_norm(module)
    assert torch.allclose(module(x), before, atol=1e-6)
    prune.l1_unstructured(module.predict, "weight", 4)
    assert module(x).shape == before.shape


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dconv bank=static(0)", "static\\(0\\): K=0"),
        ("conv", r"invalid bank=static\(1\): one kernel for all images"),
        ("pool", "invalid bank=box"),
        ("vit", r"invalid kernel=two_step: a convolution applies one kernel; expected full, depthwise"),
        ("involution", "invalid support=self: a kernel depends on the whole image"),
        ("dwsa", "invalid position=relative"),
        ("ddwconv frame=bn_relu", "invalid frame=bn_relu"),
        ("se", "a squashed weight cannot be the convolution's"),
        ("ddwconv bias=False", "the generator's bias holds the convolution's kernel"),
        ("dconv size=5", "size=5 is typed, its kernel is 3 x 3"),
        ("dconv kernel=full", "kernel=full is typed, its kernel is depthwise"),
        ("ddwconv kernel=grouped(4)", r"kernel=grouped\(4\) is typed, its kernel is depthwise"),
        ("dcomv", "unknown row 'dcomv'; did you mean 'dconv'"),
    ],
)
def test_specs_that_cannot_state_a_convolution(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DynamicConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), text)


def test_typed_cells_that_fit_are_kept() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=2)
    assert str(DynamicConv2d.from_conv(conv, "dconv kernel=full(C/4) size=3").spec) == "dconv kernel=full(C/4)"
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert str(DynamicConv2d.from_conv(depthwise, "dconv kernel=depthwise").spec) == "dconv kernel=depthwise"


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 2), "its kernel is 2 x 2: the size of a spec is an odd square"),
        (nn.Conv2d(4, 4, (1, 3)), "its kernel is 1 x 3"),
        (nn.Conv2d(4, 4, 3), "its kernel is full: bank=dynamic\\(4\\) generates depth-wise kernels only"),
        (nn.Conv2d(4, 8, 3, groups=4), "generates one kernel per channel; expected 4"),
        (nn.ConvTranspose2d(4, 4, 3), "a ConvTranspose2d is not an nn.Conv2d"),
        (nn.Conv1d(4, 4, 3), "a Conv1d is not an nn.Conv2d"),
        (nn.LazyConv2d(4, 3), "its weight has no shape before a first forward"),
        (Shifted(4, 4, 3), "a Shifted has a forward of its own"),
        (Standardised(4, 4, 3), "a Standardised has a forward of its own"),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "its weight is parametrised or pruned"),
        (prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 4), "its weight is parametrised or pruned"),
        (hooked(), "it has hooks"),
    ],
)
def test_convolutions_that_cannot_be_turned(conv: nn.Module, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DynamicConv2d.from_conv(conv, "ddwconv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 6}, "invalid out_channels=6; expected a multiple of its 4 groups"),
        ({"out_channels": 0}, "invalid out_channels=0"),
        ({"in_channels": 6}, "invalid dim=6; expected a multiple of 4"),
        ({"stride": 0}, "invalid stride=0"),
        ({"dilation": (1, 2, 3)}, r"invalid dilation=\(1, 2, 3\)"),
        ({"padding": -1}, "invalid padding=-1"),
        ({"padding": "full"}, "invalid padding='full'; expected .* same, valid, tensorflow"),
        ({"padding_mode": "constant"}, "invalid padding_mode='constant'; expected zeros, reflect"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DynamicConv2d("dconv kernel=full(4)", **{"in_channels": 8, "out_channels": 8} | arguments)


@pytest.mark.parametrize("shape", [(4, 6, 6), (1, 3, 6, 6), (1, 4, 6)])
def test_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"invalid x of shape .*; expected \(B, C, H, W\) with C = 4"):
        DynamicConv2d("dconv", 4, 4)(torch.randn(shape))
