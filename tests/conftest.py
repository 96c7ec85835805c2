"""Set-up for every test: one thread (the tensors are tiny), a fixed seed and a fixed hypothesis profile, so that a
failure repeats whatever ran before it; and ``pytest --device cuda``, which runs the suite on a GPU.

With it, the tests of the folders in `ON_DEFAULT_DEVICE` create their tensors on the GPU, as torch.set_default_device
does, and training, studies and commands find the GPU by themselves. Without it no test sees a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ON_DEFAULT_DEVICE = ("ops", "nn")

torch.set_num_threads(1)
settings.register_profile(
    "kernelbank",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernelbank")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="the device that the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, skipped without --device cuda")
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used, here and in child processes
    elif not torch.cuda.is_available():
        raise pytest.UsageError("invalid --device cuda; expected a machine on which torch finds a CUDA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device that the tests run on."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    folder = Path(request.node.path).parent.name
    if device == "cpu" or folder not in ON_DEFAULT_DEVICE or request.node.get_closest_marker("cpu"):
        yield
        return
    with torch.device(device):
        yield
