"""Several processes: the same numbers as one, exact counts, FSDP2 on gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernelbank.train import loop

sys.path.insert(0, str(Path(__file__).parent))
import processes

SCRIPT = Path(__file__).with_name("processes.py")
SIGABRT = -6


def run(case: str, folder: Path, world: int) -> Any:
    """What the first of `world` processes wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / f"{case}-{world}.json"
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world)}  # fmt: skip
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    command = [sys.executable, str(SCRIPT), case, str(file)]
    started = [subprocess.Popen(command, env={**base, **rank}, stderr=subprocess.PIPE, text=True) for rank in ranks]
    said = [process.communicate(timeout=240)[1] for process in started]
    codes = [process.returncode for process in started]
    # FSDP2 on gloo may abort while the interpreter ends, after everything is done and written
    allowed = {0, SIGABRT} if case == "sharded" else {0}
    assert set(codes) <= allowed and file.exists(), "\n".join(said)
    return json.loads(file.read_text())


def worst(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run("together", tmp_path_factory.mktemp("two"), 2)


def test_two_processes_compute_what_one_does(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, no drop path, 50 updates of the same global batch; statistics of BatchNorm over both."""
    monkeypatch.setattr(loop, "SYNC_EVERY", 1)
    one = json.loads(json.dumps(processes.equal()))
    for mixer in processes.MIXERS:
        alone, shared = one[mixer], two["equal"][mixer]
        assert len(alone["losses"]) == 50
        assert worst(alone["losses"], shared["losses"]) < 1e-5, mixer
        for a, b in zip(alone["epochs"], shared["epochs"], strict=True):
            assert abs(a["val_loss"] - b["val_loss"]) < 1e-5 and a["val_top1"] == b["val_top1"], mixer
        assert shared["norm"] == pytest.approx(alone["norm"], rel=1e-6), mixer
    assert worst(one["alone"]["losses"], two["equal"]["alone"]["losses"]) > 1e-4  # the test can fail


def test_ddp_with_everything_on_and_exact_counts(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SYNC_EVERY", 1)
    shared, alone = two["everything"], processes.everything()
    assert shared["world"] == 2 and len(shared["epochs"]) == 2 and all(0 < loss < 10 for loss in shared["losses"])
    assert shared["epochs"][-1]["ema_top1"] is not None
    assert alone["metrics"]["count"] == shared["metrics"]["count"] == 37  # no image twice, none left out
    assert all(alone["metrics"][name] == shared["metrics"][name] for name in ("top1", "top5", "unreadable"))
    assert alone["metrics"]["loss"] == pytest.approx(shared["metrics"]["loss"], rel=1e-6)


def test_the_probes_of_two_processes_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses, the epochs and the weights' norm are the same bits whichever process's probe prefers which form."""
    found = []
    for gains in ("0.9 0.9", "1.5 0.9"):
        monkeypatch.setenv("GAINS", gains)
        found.append(run("probed", tmp_path, 2))
        (tmp_path / "probed-2.json").unlink()
    steady, flipped = found
    assert not steady.pop("differs") and flipped.pop("differs")  # outside training the probe decides
    assert steady == flipped and len(steady["losses"]) == 20


@pytest.mark.slow
def test_fsdp2_trains_and_resumes(tmp_path: Path) -> None:
    one, two = run("sharded", tmp_path, 1), run("sharded", tmp_path, 2)
    assert worst(one["whole"]["losses"], two["whole"]["losses"]) < 1e-4
    assert two["resumed"]["epochs"] == two["whole"]["epochs"] and two["resumed"]["norm"] == two["whole"]["norm"]
    assert two["resumed"]["losses"] == two["whole"]["losses"][10:]  # it went on, it did not start again
