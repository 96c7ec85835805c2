"""Compare models before and after `kernelbank.dynamize`, and their experts after ten steps of training.

``python benchmarks/dynamize.py FOLDER`` writes record.json and, from it, table.md, the tables of docs/dynamize.md. It
uses one thread and random weights, and takes a minute.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import kernelbank
from kernelbank.files import replace_text
from kernelbank.nn.dynamic_conv import DynamicConv2d
from kernelbank.nn.edit.dynamize import DynamizeReport
from kernelbank.records import CodeIdentity, MachineIdentity

COLD = "dconv mix=predict(softmax, tau=30, r=4)"
MODELS = (
    ("resnet18", COLD), ("resnet18", "condconv"), ("mobilenetv2_100", "condconv"),
    ("mobilenetv3_small_100", "condconv"), ("tf_mobilenetv3_large_100", "dconv"),
    ("convnext_atto", "ddwconv"), ("convnext_atto", "dconv"),
)  # fmt: skip


def with_random_scales(model: nn.Module) -> nn.Module:
    """Draw every scale in 0.5 to 1.5, since a branch that starts at zero would hide differences."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
    return model


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| over the largest |a|."""
    return float((a - b).abs().max() / a.abs().max())


@torch.no_grad()
def start(name: str, text: str) -> dict[str, Any]:
    """Compare the outputs of a model and of its dynamic copy, in float32, in float64, and in float64 and training."""
    torch.manual_seed(0)
    model = with_random_scales(timm.create_model(name)).eval()
    twin, images = kernelbank.dynamize(copy.deepcopy(model), text), torch.randn(2, 3, 128, 128)
    report = twin.dynamized
    assert isinstance(report, DynamizeReport)
    found: dict[str, Any] = {
        "model": name, "text": text, "turned": len(report.converted), "convolutions": len(report.outcomes),
        "parameters": [sum(p.numel() for p in net.parameters()) for net in (model, twin)],
        "float32": difference(model(images), twin(images)),
    }  # fmt: skip
    model, twin, images = model.double(), twin.double(), images.double()
    found["float64"] = difference(model(images), twin(images))
    return found | {"training": difference(model.train()(images), twin.train()(images))}


def train_experts(text: str, routed: bool = True) -> dict[str, Any]:
    """Train ResNet-18 for ten steps and return the distances of its experts, relative to their norm."""
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    net = kernelbank.dynamize(net, text).train()
    convs = [module for module in net.modules() if isinstance(module, DynamicConv2d)]
    if not routed:
        for conv in convs:
            nn.init.zeros_(conv.predict.weight)
            nn.init.zeros_(conv.predict.bias)
    before = distances(convs)
    torch.manual_seed(1)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(16, 3, 64, 64)), torch.randint(10, (16,)))
        loss.backward()
        optimiser.step()
    after = distances(convs)
    return {"text": text, "routed": routed, "start": max(before), "least": min(after), "most": max(after)}


def distances(convs: list[DynamicConv2d]) -> list[float]:
    """The distance of every pair of experts of every convolution over their mean norm."""
    flat = [conv.weight.detach().flatten(1) for conv in convs if conv.weight is not None]
    return [float(d) for experts in flat for d in torch.pdist(experts) / experts.norm(dim=1).mean()]


def table(record: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown."""
    yield "| model | text | turned | parameters, M | float32 | float64 | float64, training |"
    yield "|---|---|---|---|---|---|---|"
    for found in record["start"]:
        old, new = (f"{count / 1e6:.2f}" for count in found["parameters"])
        numbers = " | ".join(f"{found[kind]:.1e}" for kind in ("float32", "float64", "training"))
        turned = f"{found['turned']} of {found['convolutions']}"
        yield f"| {found['model']} | `{found['text']}` | {turned} | {old} -> {new} | {numbers} |"
    yield from ("", "| text | start | smallest | largest |", "|---|---|---|---|")
    for found in record["experts"]:
        text = f"`{found['text']}`" + ("" if found["routed"] else ", routing set to zero")
        yield f"| {text} | {found['start']:.1e} | {found['least']:.1e} | {found['most']:.1e} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": asdict(MachineIdentity.here(1)), "code": asdict(CodeIdentity.here()), "timm": timm.__version__,
        "start": [start(*model) for model in MODELS],
        "experts": [train_experts(COLD), train_experts(COLD, routed=False), train_experts("dconv"),
                    train_experts("condconv bank=static(4)")],
    }  # fmt: skip
    replace_text(folder / "record.json", json.dumps(record, indent=1) + "\n")
    replace_text(folder / "table.md", "\n".join(table(record)) + "\n")
