"""A study on a local Ray cluster of two nodes, of which one is killed in the middle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kernelbank.cli import main
from kernelbank.records import RunRecord

WORDS = ["study", "softmax", "--models", "plain", "--rows", "softmax", "relu", "--seeds", "0", "1", "2", "3",
         "--epochs", "8"]  # fmt: skip


def numbers(folder: Path) -> dict[str, object]:
    """Every record by name, without what may differ from one execution to the next."""
    found: dict[str, object] = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = RunRecord.load(path)
        epochs = tuple(replace(epoch, seconds=0.0, waited=None) for epoch in record.epochs)
        found[path.name] = replace(record, epochs=epochs, code=None, machine=None)  # type: ignore[arg-type]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_node_loses_nothing_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utilities = pytest.importorskip("ray.cluster_utils")
    paths = os.pathsep.join(filter(None, sys.path))
    monkeypatch.setenv("PYTHONPATH", paths)
    cluster = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        _, second = (cluster.add_node(num_cpus=1) for _ in range(2))
        study = subprocess.Popen(
            [sys.executable, "-m", "kernelbank", *WORDS, "--on", "ray", "--out", str(tmp_path / "ray")],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, "RAY_ADDRESS": cluster.address},
        )  # fmt: skip
        deadline, folder = time.monotonic() + 300, tmp_path / "ray"
        while len(list(folder.glob("checkpoints/*.safetensors"))) < 2 or not list(folder.glob("records/*.json")):
            assert time.monotonic() < deadline and study.poll() is None, study.communicate()[1]
            time.sleep(0.05)
        before = {path: path.read_bytes() for path in folder.glob("records/*.json")}
        assert 0 < len(before) < 8
        cluster.remove_node(second, allow_graceful=False)
        told = study.communicate(timeout=300)[1]
        assert study.returncode == 0, told
    finally:
        cluster.shutdown()
    done = re.findall(r"^\[\d+/8\] (.*?):", told, re.MULTILINE)
    assert len(done) == len(set(done)) == 8  # every run once
    assert {path: path.read_bytes() for path in before} == before
    assert not list(folder.glob("checkpoints/*"))
    assert main([*WORDS, "--jobs", "2", "--out", str(tmp_path / "here")]) == 0
    assert numbers(folder) == numbers(tmp_path / "here")


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*WORDS, "--on", "ray", "--out", str(tmp_path / "out")]) == 2
    said = "kernelbank: error: --on ray needs ray: pip install 'kernelbank[ray]'\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()
    assert main([*WORDS, "--on", "slurm"]) == 2
    assert "invalid --on=slurm; expected ray or ray://HOST:PORT" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Ray Client connection timed out")
def test_a_cluster_that_cannot_be_reached_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    assert main([*WORDS, "--on", "ray://127.0.0.1:9", "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kernelbank: error: on: no Ray cluster can be reached by ray://127.0.0.1:9 (")
