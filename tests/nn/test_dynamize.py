"""dynamize: whole ConvNets, what is turned, what is not and why, and the names."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import CondConv2d
from timm.models import create_model
from torch import nn
from torch.nn.utils import parametrizations

from kernelbank import SpecError, dynamize
from kernelbank.errors import InputError
from kernelbank.nn.dynamic_conv import DynamicConv2d
from kernelbank.nn.edit.dynamize import DynamizeReport, survey


def report(model: nn.Module) -> DynamizeReport:
    return model.dynamized


def dynamic(model: nn.Module) -> dict[str, DynamicConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv2d)}


def randomised(model: nn.Module) -> nn.Module:
    """float64, with statistics and scales away from their start: a branch times 0 or 1e-6 would hide a difference."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_mean"):
                tensor.normal_(std=0.1)
            elif name.endswith(("running_var", "gamma")) or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
    return model.double()


NETS = {
    "resnet18": "dconv mix=predict(softmax, tau=30, r=4)",
    "test_efficientnet": "condconv",
    "tf_mobilenetv3_small_minimal_100": "dconv",
    "mobilenetv2_035": "condconv bank=static(3)",
    "convnext_atto": "ddwconv",
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_timm_nets_start_where_they_were(name: str, training: bool) -> None:
    """In training too: BatchNorm sees the same values, and there is no dropout in these nets."""
    net = randomised(create_model(name, num_classes=7)).train(training)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    turned = dynamize(copy.deepcopy(net), NETS[name])
    expected, y = net(x), turned(x)
    assert len(dynamic(turned)) == len(report(turned).converted) > 3
    assert float((y - expected).detach().abs().max() / expected.detach().abs().max()) < 1e-10
    y.sum().backward()
    assert all(p.grad is not None for p in turned.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_experts_of_a_resnet_differ_after_ten_steps(name: str) -> None:
    net = dynamize(create_model(name, num_classes=4, zero_init_last=False), "dconv mix=predict(softmax, tau=30, r=4)")
    equal = copy.deepcopy(net)
    with torch.no_grad():
        for module in dynamic(equal).values():
            module.predict.weight.zero_()
            module.predict.bias.zero_()
    for model in (net, equal):
        optimiser = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(10):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(4, (4,))).backward()
            optimiser.step()
    apart, together = ([nearest_and_farthest(m) for m in dynamic(model).values()] for model in (net, equal))
    assert min(nearest for nearest, _ in apart) > 1e-5
    assert max(farthest for _, farthest in together) < 1e-7


def nearest_and_farthest(module: DynamicConv2d) -> tuple[float, float]:
    """The distances of the nearest and the farthest two experts over the norm of one."""
    flat = module.weight.detach().flatten(1)
    apart = torch.pdist(flat) / flat.norm(dim=1).mean()
    return float(apart.min()), float(apart.max())


def test_the_report_counts_and_gives_reasons() -> None:
    net = create_model("convnext_atto")
    text = str(report(dynamize(net, "ddwconv")))
    lines = text.splitlines()
    assert lines[0].split() == ["convolution", "was", "became"]
    assert lines[-1] == "12 of 40 convolutions became dynamic with 'ddwconv'"
    held = {line.name: line for line in report(net).outcomes}
    assert str(held["stages.0.blocks.0.conv_dw"].spec) == "ddwconv frame=bare"
    assert held["stem.0"].reason.startswith("the first convolution")
    assert held["stages.1.downsample.1"].reason == "its kernel is 2 x 2: the size of a spec is an odd square"
    assert held["stages.0.blocks.0.mlp.fc1"].reason.startswith("its kernel is full: bank=dynamic(4)")
    assert {line.name for line in report(net).converted} == dynamic(net).keys()
    assert len(lines) == 42 and all(line.reason for line in report(net).unchanged)


def test_survey_changes_nothing_and_says_the_same() -> None:
    net = create_model("test_resnet")
    before = str(net)
    beforehand = survey(net, "dconv")
    assert str(net) == before and not hasattr(net, "dynamized")
    assert dynamize(net, "dconv") is net and report(net) == beforehand


def test_specs_follow_each_convolution() -> None:
    net = dynamize(create_model("test_efficientnet"), "condconv")
    for name, module in dynamic(net).items():
        assert module.spec.size == module.kernel_size[0] == module.weight.shape[-1], name
        assert str(module.spec.kernel) == ("depthwise" if module.groups > 1 else "full")


def test_a_typed_cell_takes_the_convolutions_that_have_it() -> None:
    net = dynamize(create_model("resnet18"), "dconv size=3")
    assert {module.spec.size for module in dynamic(net).values()} == {3}
    reasons = {line.name: line.reason for line in report(net).unchanged}
    assert reasons["layer2.0.downsample.0"] == "size=3 is typed, its kernel is 1 x 1"
    assert set(reasons) == {"conv1", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ("layer4", (), {f"layer4.{end}" for end in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2")}),
        (["layer1.0.conv1", "conv1"], (), {"layer1.0.conv1", "conv1"}),
        ("layer4", "*.conv1", {"layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"}),
        ("*.downsample", ("layer2", "layer3"), {"layer4.0.downsample.0"}),
        (None, ["layer[123]", "*.conv2"], {"layer4.0.conv1", "layer4.0.downsample.0", "layer4.1.conv1"}),
    ],
)  # fmt: skip
def test_names_and_patterns(only: str | list[str] | None, skip: str | list[str], expected: set[str]) -> None:
    net = dynamize(create_model("resnet18"), "dconv", only=only, skip=skip)
    assert dynamic(net).keys() == expected


def test_a_single_convolution_comes_back_as_a_new_module() -> None:
    conv = nn.Conv2d(4, 8, 3)
    module = dynamize(conv, "dconv")
    assert isinstance(module, DynamicConv2d) and report(module).converted[0].name == ""
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(module(x), conv(x), atol=1e-6)


# ---- what cannot be turned -------------------------------------------------------------------------------


class Odd(nn.Module):
    """One of everything that cannot be turned, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.shared = nn.Conv2d(4, 4, 3)
        self.again = self.shared
        self.tied = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.linear.bias = self.tied.bias
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.line = nn.Conv1d(4, 4, 3)
        self.normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.conditional = CondConv2d(4, 4, 3)
        self.dynamic = DynamicConv2d("dconv", 4, 4)
        self.plain = nn.Conv2d(4, 4, 3)


def test_every_convolution_is_listed_with_its_reason() -> None:
    held = {line.name: line.reason for line in survey(Odd(), "dconv").outcomes}
    assert held == {
        "stem": "the first convolution sees the raw image; name it in only= to replace it",
        "shared": "it shares its weight with again",
        "again": "it shares its weight with shared",
        "tied": "it shares its weight with linear",
        "up": "a ConvTranspose2d is not an nn.Conv2d",
        "line": "a Conv1d is not an nn.Conv2d",
        "normed": "its weight is parametrised or pruned",
        "conditional": "a CondConv2d is not an nn.Conv2d",
        "dynamic": "a DynamicConv2d is not an nn.Conv2d",
        "plain": "",
    }


@pytest.mark.parametrize(
    ("make", "text", "names", "message"),
    [
        (Odd, "dconv", {"only": "up"}, "only='up': 'dconv' cannot replace ConvTranspose2d.*: a ConvTranspose2d is not"),
        (Odd, "dconv", {"only": ["plain", "shared"]}, "only='shared': .* it shares its weight with again"),
        (Odd, "dconv", {"only": "plain", "skip": "pl*"}, "only='plain': .* named in skip="),
        (Odd, "ddwconv", {}, "'ddwconv' replaces none of the 10 convolutions: stem: .*; and 7 more"),
        (Odd, "dconv", {"only": "plein"}, "only='plein', which matches no convolution; did you mean 'plain'"),
        (Odd, "dconv", {"skip": ["plain", "layer9"]}, "skip='layer9', which matches no convolution"),
        (Odd, "dconv", {"only": ()}, "replaces none of the 10 convolutions"),
        (lambda: nn.Linear(2, 2), "dconv", {}, "a Linear without convolutions"),
    ],
)
def test_what_is_asked_for_and_cannot_be_done(
    make: Callable[[], nn.Module], text: str, names: dict[str, str], message: str
) -> None:
    net = make()
    before = str(net)
    with pytest.raises(InputError, match=message):
        dynamize(net, text, **names)
    assert str(net) == before and not hasattr(net, "dynamized")


@pytest.mark.parametrize(
    "text", ["conv", "vit", "se", "ddwconv bias=False", "dconv bank=static(0)", "dconv kernal=full", ""]
)
def test_a_record_that_makes_no_dynamic_convolution(text: str) -> None:
    with pytest.raises(SpecError):
        dynamize(create_model("test_resnet"), text)


# ---- timm's and torch's tools on a turned net ------------------------------------------------------------


def test_fx_features_meta_and_autocast() -> None:
    net = dynamize(create_model("test_resnet", num_classes=3), "dconv").eval()
    x = torch.randn(2, 3, 48, 40)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x)) and traced.state_dict().keys() == net.state_dict().keys()
    maps = timm.models.create_feature_extractor(net, {"layer2": "map"})(x)
    assert maps["map"].ndim == 4
    with torch.device("meta"):
        empty = dynamize(create_model("test_resnet", num_classes=3), "dconv")
    empty.to_empty(device=x.device).load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(empty.eval()(x), net(x))
    expected = net(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.allclose(net(x).float(), expected, atol=0.1)


def test_features_only_and_channels_last() -> None:
    net = dynamize(create_model("test_resnet", features_only=True), "dconv").eval()
    x = torch.randn(2, 3, 33, 47)
    expected = net(x)
    turned = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert [y.shape[1] for y in expected] == net.feature_info.channels()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(turned, expected, strict=True))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in turned)
