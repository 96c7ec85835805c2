"""Every row on a GPU that is not there: torch's fake tensors have a device and a shape and no values, so a tensor left
on the CPU, a result on another device and a value that is read back to the host are errors on any machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelbank import Mixer, use_path
from kernelbank.atlas import ROWS
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.kernels import launch
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths import MIXER_PATHS, POSITION_PATHS, triton
from kernelbank.spec import SpecError

GRID = (6, 4)
DIM, HEADS, BATCH = 32, 2, 2
WINDOWS = ("swin support=window(2)", "swin support=window(3, 1)", "swin support=window(2) activation=relu,count",
           "maxvit_grid support=grid(2)", "maxvit_grid support=grid(3) activation=relu,count")  # fmt: skip
EXCLUDED = {"reference", "moments", "pointwise_onednn"}
"""The definition, a loop over positions; the path whose guard reads values; and the one of a library for CPUs."""


def built(grid: tuple[int, int] = GRID) -> Iterator[Mixer]:
    """Every row, with and without a prefix token."""
    for prefix in (0, 1):
        for text in (*ROWS, *WINDOWS):
            try:
                yield Mixer(text, DIM, HEADS, grid, prefix=prefix)
            except SpecError:
                continue  # a convolution takes no prefix tokens


def place(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every tensor of a model by a fake one on a GPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept = dtype if tensor.is_floating_point() else tensor.dtype
                    fake = torch.empty(tensor.shape, dtype=kept, device="cuda")
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "gpu", lambda device: launch.Gpu("a GPU", (9, 0), 232448))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(6, 4), (15, 14)])
def test_every_row_stays_on_its_device(dtype: torch.dtype, grid: tuple[int, int]) -> None:
    """Grids of 24 and 210 positions: the plan takes other paths where there are many kernels."""
    calls = 0
    for mixer in built(grid):
        with FakeTensorMode(allow_non_fake_inputs=False):
            place(mixer, dtype)
            x = torch.empty(BATCH, mixer.prefix + grid[0] * grid[1], DIM, device="cuda", dtype=dtype)
            y = mixer(x)
        assert (y.device.type, y.shape, y.dtype) == ("cuda", x.shape, dtype), mixer.spec
        calls += 1
    assert calls >= 2 * len(ROWS) - 15


def test_every_path_stays_on_its_device() -> None:
    """Forced paths, those of Triton by the fake kernels of their operators."""
    served: set[str] = set()
    for mixer in built():
        s = Context(mixer.spec, DIM, HEADS, geometry(mixer.spec, GRID, mixer.prefix))
        call, here = Call(device="cuda", tokens=BATCH * (mixer.prefix + GRID[0] * GRID[1])), Machine("cuda")
        reads = MIXER_PATHS["moments"].unsupported(s, call, here) is None  # a forced operator of positions takes it
        paths = MIXER_PATHS | ({} if reads else POSITION_PATHS)
        names = [name for name in paths if name not in EXCLUDED and paths[name].unsupported(s, call, here) is None]
        with FakeTensorMode(allow_non_fake_inputs=False):
            place(mixer, torch.float32)
            x = torch.empty(BATCH, mixer.prefix + GRID[0] * GRID[1], DIM, device="cuda")
            for name in names:
                with use_path(name):
                    y = mixer(x)
                assert (y.device.type, y.shape) == ("cuda", x.shape), f"{name}: {mixer.spec}"
        served |= set(names)
    expected = {*MIXER_PATHS, *POSITION_PATHS} - EXCLUDED
    assert launch.available() is False or served == expected, expected - served
