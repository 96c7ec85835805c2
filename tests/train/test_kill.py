"""A run that is killed at random moments ends with the weights of one that was not, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killing.py")
TRAIN = ["train", "plain", "--mixer", "vit_relpos", "--data", "digits", "--recipe", "digits", "--device", "cpu",
         "--drop-path", "0.1", "--ema", "0.95", "--label-smoothing", "0.1", "--shift", "1", "--out", "OUT"]  # fmt: skip
STUDY = ["study", "softmax", "--models", "plain", "--rows", "softmax", "relu", "--seeds", "0", "--epochs", "6",
         "--workers", "1", "--out", "OUT"]  # fmt: skip


def kill(kills: int, folder: Path, *words: str) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(kills), "7", str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    said = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert done.returncode == 0, done.stderr + said
    return int(done.stdout.split()[-1])


def without_times(document: Any) -> Any:
    """A record without what may differ from one execution to the next."""
    dropped = ("seconds", "waited", "machine", "code", "row")
    if isinstance(document, dict):
        return {key: without_times(value) for key, value in document.items() if key not in dropped}
    return [without_times(value) for value in document] if isinstance(document, list) else document


@pytest.mark.parametrize(("kills", "epochs"), [(2, 4), pytest.param(10, 12, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, kills: int, epochs: int) -> None:
    hits = kill(kills, tmp_path, *TRAIN, "--epochs", str(epochs))
    assert hits >= kills - 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("weights.safetensors", "ema.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    records = [without_times(json.loads((folder / "record.json").read_text())) for folder in (whole, killed)]
    assert records[0] == records[1] and len(records[0]["epochs"]) == epochs
    lines = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == list(range(1, epochs + 1))
    assert not list(killed.glob("*.tmp")) and not list(killed.glob("*.broken"))


@pytest.mark.slow
def test_a_study_killed_ten_times_ends_with_the_same_records(tmp_path: Path) -> None:
    assert kill(10, tmp_path, *STUDY) >= 8
    found = []
    for name in ("whole", "killed"):
        paths = sorted((tmp_path / name / "records").glob("*.json"))
        assert len(paths) == 2 and not list((tmp_path / name).rglob("*.tmp"))
        found.append({path.name: without_times(json.loads(path.read_text())) for path in paths})
    assert found[0] == found[1]
