"""timm's own tests/test_models.py, unmodified, on our models. It is not ours to commit: KERNELBANK_TIMM_TESTS names a
copy (huggingface/pytorch-image-models at aa4b5850, which runs against timm 1.0.31)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MARKERS = ("base", "cfg", "torchscript", "features", "fxforward", "fxbackward", "timeout")
COPY = os.environ.get("KERNELBANK_TIMM_TESTS", "")

pytestmark = pytest.mark.skipif(not COPY, reason="KERNELBANK_TIMM_TESTS names no copy of timm's tests/test_models.py")


@pytest.mark.parametrize("models", [
    "*test*,vit_*_tiny_*",
    pytest.param("*small*,swin_*,dwnet_tiny,*base*,dwnet_base", marks=pytest.mark.slow),
])  # fmt: skip
def test_timms_own_tests_pass(models: str, tmp_path: Path) -> None:
    (tmp_path / "test_models.py").write_text(Path(COPY).read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f" {name}\n" for name in MARKERS))
    environment = {"GITHUB_ACTIONS": "1", "TIMEOUT": "600", "KERNELBANK_MODELS": models}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kernelbank.testing.timm_plugin", "test_models.py",
               "-m", "not torchscript", "-k", "not naflex and not gemma4"]  # fmt: skip
    ran = subprocess.run(
        command, check=False, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= 6 * len(models.split(",")), ran.stdout[-500:]
