"""Triton kernels on CPU in Triton's interpreter, in processes of their own, outputs and every gradient against float64;
their operators as torch sees them; and what their paths do not support."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import opcheck

from kernelbank import Mixer, MixerSpec, use_path
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.kernels import launch
from kernelbank.ops.kernels.depthwise import depthwise_attention
from kernelbank.ops.kernels.moments import moments_attention
from kernelbank.ops.kernels.pointwise import pointwise_attention
from kernelbank.ops.kernels.regions import region_attention
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import MIXER_PATHS, POSITION_PATHS, triton
from kernelbank.ops.paths.path import PathError
from kernelbank.ops.plan import plan, verdicts

HERE = Path(__file__).parent
RECORDS = HERE.parents[1] / "records" / "gpu"
TRITON_PATHS = [*(path.name for path in triton.PATHS), triton.POSITION.name]


@pytest.mark.parametrize("script", ["kernel_cases.py", "path_cases.py"])
def test_kernels_in_the_interpreter(script: str) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA")
    paths = [str(HERE.parent), str(HERE.parents[1] / "src"), str(HERE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    worst: dict[tuple[str, str], float] = {}
    for line in lines:
        for result, error in line["errors"].items():
            assert error <= line["tolerance"], f"{line['case']}, {line['dtype']}: {result} differs by {error:.1e}"
            at = (line["kind"], line["dtype"])
            worst[at] = max(worst.get(at, 0.0), error)
    counts = Counter((line["kind"], line["dtype"]) for line in lines)
    results = sum(len(line["errors"]) for line in lines)
    print(f"\n{len(lines)} calls, {results} results: {dict(counts)}; worst {worst}")
    assert len(lines) >= 25 and {line["dtype"] for line in lines} >= {"float32", "float16"}


# ---- operators -------------------------------------------------------------------------------------------


def arguments(name: str) -> tuple[Any, tuple[Any, ...]]:
    """An operator and small arguments that need gradients, in float64: the naive form runs them."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, key, value, rows = draw(1, 2, 7, 4), draw(1, 2, 7, 4), draw(1, 2, 7, 4), torch.rand(3, 7) + 0.5
    entries, x = draw(2, 15 + 3), draw(1, 6, 4)
    match name:
        case "pointwise":
            regions = torch.tensor([-1, 0, 0, 1, 0, 0, 1], dtype=torch.int32)
            return pointwise_attention, (q, key, value, entries, rows, regions, 1, 3, [2, 3], "gelu", 0.5)
        case "moments":
            return moments_attention, (q, key, value, entries, rows, 1, 3, [2, 3], True, 0.5)
        case "regions":
            members = torch.tensor([[0, 3, 1, 4], [2, -1, 6, 5]], dtype=torch.int32)
            return region_attention, (q, key, value, draw(2, 9), rows, members, 2, [2, 2], "softmax", 0.5)
        case _:
            return depthwise_attention, (draw(1, 6, 4), x, draw(2, 3, 5), 2, 3)


OPERATORS = ("pointwise", "moments", "regions", "depthwise")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck reads it
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_one_of_torch(name: str) -> None:
    """Its schema, its fake kernel, its autograd registration, and AOT autograd with symbolic shapes."""
    operator, given = arguments(name)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(operator, given, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_first_and_second_derivatives_of_an_operator(name: str) -> None:
    operator, given = arguments(name)
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        replaced = iter(tensors)
        o = operator(*(next(replaced) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in given))
        return o if isinstance(o, torch.Tensor) else o[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# ---- paths -----------------------------------------------------------------------------------------------

FORCED = {
    "triton_pointwise": "relu_attention",
    "triton_moments": "layernorm_attention",
    "triton_regions": "swin support=window(2)",
    "triton_depthwise": "dwsa",
    "triton_toeplitz": "dwsa",
}


@pytest.mark.parametrize("path", TRITON_PATHS)
def test_a_forced_kernel_that_cannot_serve_is_an_error(path: str) -> None:
    mixer = Mixer(FORCED[path], 8, 2, (4, 4))
    with use_path(path), pytest.raises(PathError, match=r"it runs on CUDA GPUs, not on device cpu|not installed"):
        mixer(torch.randn(1, 16, 8))


class Gpu:
    """What torch says of a GPU, in place of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], memory: int, name: str) -> None:
        monkeypatch.setattr(triton, "gpu", lambda device: launch.Gpu(name, capability, memory))
        monkeypatch.setattr(triton, "available", lambda: True)


def reason(
    path: str, text: str, dim: int = 64, heads: int = 2, grid: tuple[int, int] = (4, 4), **call: Any
) -> str | None:
    """Why a path does not support a spec on a GPU."""
    spec = MixerSpec.parse(text).at_block(0)
    s = Context(spec, dim, heads, geometry(spec, grid, call.pop("prefix", 0)))
    return {**MIXER_PATHS, **POSITION_PATHS}[path].unsupported(s, Call(device="cuda", **call), Machine("cuda"))


def test_what_the_kernels_do_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (9, 0), 232448, "NVIDIA H100 80GB HBM3")
    for path, text in FORCED.items():
        assert reason(path, text) is None
        assert reason(path, text, dtype=torch.float64) == "it runs in float32, float16 and bfloat16, not float64"
        assert reason(path, text, transformed=True) == "it has no rule for transforms of torch.func"
    relu = "relu_attention"
    assert reason("triton_pointwise", relu, 258, 2) == "heads of 129 channels are wider than 128"
    assert reason("triton_pointwise", "vit") == (
        "its activations are identity, relu, relu2, sigmoid, gelu between affine steps"
    )
    assert reason("triton_pointwise", f"{relu} support=neighborhood(3)") == "support=neighborhood(3) has no regions"
    assert reason("triton_pointwise", f"{relu} support=window(2) activation=relu,count@positions") == (
        "@positions depends on the kernel where kernels are hidden"
    )
    assert reason("triton_pointwise", f"{relu} support=grid(2)") is None
    assert reason("triton_pointwise", "maxvit_grid support=grid(2) activation=relu,count") == (
        "its table counts offsets in steps of 1 x 1, not 2 x 2"
    )
    assert reason("triton_regions", "maxvit_grid support=grid(2)") == (
        "the regions of support=grid(2) are no rectangles"
    )
    assert reason("triton_regions", "swin support=window(2)", prefix=1) == "a prefix token belongs to every region"
    assert reason("triton_regions", "swin support=window(9)", grid=(18, 18)) == "regions of 81 cells have more than 64"
    assert reason("triton_depthwise", "dwsa", prefix=1) == "a prefix token has entries of its own"
    assert reason("triton_depthwise", "dwsa size=3") is not None


def test_an_old_gpu_and_one_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (7, 5), 65536, "Tesla T4")
    assert reason("triton_depthwise", "dwsa") == "compute capability 7.5 is older than 8.0"
    Gpu(monkeypatch, (8, 6), 49152, "a GPU")
    found = reason("triton_pointwise", "relu_attention", 128, 1, dtype=torch.bfloat16)
    assert found is not None and "bytes of shared memory, and the device has 49152" in found


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "available", lambda: False)
    assert {reason(path, text) for path, text in FORCED.items()} == {"Triton is not installed"}


def test_a_default_is_earned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is taken by itself on a device family that a table names, and on no other."""
    Gpu(monkeypatch, (9, 0), 232448, "NVIDIA H100 80GB HBM3")
    spec = MixerSpec.parse("relu_attention")
    s, call = Context(spec, 64, 2, geometry(spec, (4, 4), 0)), Call(device="cuda", dtype=torch.bfloat16)
    assert plan(s, call, Machine("cuda")).path == "vectorised"
    monkeypatch.setattr(triton, "AHEAD", {"triton_pointwise": frozenset({"A100"})})
    assert plan(s, call, Machine("cuda")).path == "vectorised"
    monkeypatch.setattr(triton, "AHEAD", {"triton_pointwise": frozenset({"H100"})})
    chosen = plan(s, call, Machine("cuda"))
    assert (chosen.path, chosen.reason) == ("triton_pointwise", "measured ahead on H100")
    names = {verdict.path: verdict.verdict for verdict in verdicts(s, call, Machine("cuda"))}
    assert names["triton_pointwise"] == "chosen" and names["triton_moments"] == "unsupported"


def test_every_family_ahead_has_a_run_record() -> None:
    """`AHEAD` names a family only where a run record shows the path faster than every other measured there."""
    records = [json.loads(file.read_text()) for file in sorted(RECORDS.glob("*.json"))]
    for path, families in triton.AHEAD.items():
        for family in families:
            lines = [line for record in records if family in record["machine"]["device"]
                     for line in record["operators"] if line["path"] == path]  # fmt: skip
            assert lines and all(line["ratio_to_best_other"] > 1 for line in lines), f"{path} on {family}"
