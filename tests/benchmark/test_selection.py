"""benchmarks/selection.py: the statistics that it writes are those of the model on the validation images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernelbank.cli import main
from kernelbank.data.digits import digits
from kernelbank.data.order import Part, in_order
from kernelbank.explanation.capture import explain
from kernelbank.explanation.statistics import statistics
from kernelbank.weights.load import load

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "selection.py"
WORDS = ["train", "plain", "--data", "digits", "--recipe", "digits", "--epochs", "1", "--device", "cpu"]


def measure(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one epoch."""
    folder = tmp_path_factory.mktemp("runs")
    for name, mixer in (("softmax", "vit_relpos"), ("depthwise", "dwsa")):
        assert main([*WORDS, "--mixer", mixer, "--out", str(folder / name)]) == 0
    return folder


def test_the_statistics_are_those_of_all_images_at_once(runs: Path) -> None:
    out = runs / "selection.json"
    done = measure(str(out), str(runs / "softmax"), str(runs / "depthwise"), "--images", "20")
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    softmax, depthwise = document["runs"]
    assert softmax["images"] == 20 and softmax["row"] == "softmax"
    assert softmax["record"] == json.loads((runs / "softmax" / "record.json").read_text())
    images, _ = next(digits().val.batches(in_order(20, 20, Part()), None))
    model = load(runs / "softmax" / "weights.safetensors").eval()
    expected = statistics(explain(model, images))
    assert len(softmax["heads"]) == len(expected) == 8
    for head, own in zip(softmax["heads"], expected, strict=True):  # batches of 16 and 4 there, one of 20 here
        for name in ("rank_correlation", "effective", "sparsity", "distance", "static_share"):
            assert head[name] == pytest.approx(getattr(own, name), rel=1e-4, abs=1e-6), name
    assert all(head["rank_correlation"] is None and head["effective"] > 0 for head in depthwise["heads"])
    assert "| blocks.1.attn |" in done.stdout and "`dwsa`" in done.stdout


def test_what_is_no_run_is_one_line(runs: Path) -> None:
    out = runs / "never.json"
    for words, said in (
        ([str(runs / "none")], "is not the folder of a run"),
        ([str(runs / "softmax"), "--images", "0"], "invalid --images=0"),
    ):
        done = measure(str(out), *words)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and not out.exists()
