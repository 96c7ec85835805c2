"""A study that is killed or stopped at any moment loses nothing, and ends with the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies.small_study import WORDS, numbers, study

from kernelbank.records import RunRecord
from kernelbank.studies import runner
from kernelbank.train.signals import stop_on_signal

AS_IN_A_TERMINAL = """\
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""
"""Ctrl-C is ignored in jobs that a shell script starts in the background, and in what these start."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_while_workers_start_reaches_the_parent_alone() -> None:
    blocked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    lines: list[str] = []
    with stop_on_signal(lines.append) as request:
        with runner._interrupts_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            worker = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True)
        assert request() and request.signal == signal.SIGINT  # delivered when it is unblocked, if not before
    assert worker.stdout == "True\n" and len(lines) == 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_while_a_study_starts_ends_it_in_seconds(tmp_path: Path) -> None:
    """The signal goes to the whole process group, as from a terminal, at moments while modules are imported, workers
    start and training begins."""
    words = [sys.executable, "-c", AS_IN_A_TERMINAL, "-m", "kernelbank", *WORDS, "--epochs", "500", "--jobs", "2"]
    for index, moment in enumerate(("study softmax", ".lock", "checkpoints")):
        out = tmp_path / str(index)
        process = subprocess.Popen(
            [*words, "--out", str(out)], start_new_session=True, text=True, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        deadline = time.monotonic() + 120
        if moment == "study softmax":  # the line before the workers start
            while moment not in process.stderr.readline():
                assert time.monotonic() < deadline and process.poll() is None
        else:
            while not (out / moment).exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        begun = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said
        assert time.monotonic() - begun < 30


def test_a_killed_study_ends_with_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kernelbank", *WORDS, "--out", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    assert process.stderr is not None
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert len(list(tmp_path.glob("records/*.json"))) < 2
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)
    assert study(tmp_path) == 0
    assert numbers(tmp_path) == numbers(whole)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.broken"))


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sigterm_stops_a_study_with_checkpoints(whole: Path, tmp_path: Path, jobs: str) -> None:
    words = [sys.executable, "-m", "kernelbank", *WORDS, "--out", str(tmp_path), "--jobs", jobs]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), text=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints/*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "run the same command to resume" in told and "Traceback" not in told
    kept = list(tmp_path.glob("checkpoints/*.safetensors")) + list(tmp_path.glob("records/*.json"))
    assert kept and len(list(tmp_path.glob("records/*.json"))) < 2
    assert study(tmp_path) == 0
    assert numbers(tmp_path) == numbers(whole)


@pytest.mark.slow
def test_processes_of_torchrun_train_every_run_together(whole: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kernelbank", *WORDS]
    done = subprocess.run([sys.executable, *words, "--out", str(tmp_path)], check=False, capture_output=True, text=True,
                          env=environment() | {"OMP_NUM_THREADS": "1"}, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 runs, 0 finished before") == 1 and done.stdout.count("table.md") == 1
    found = {path.name: RunRecord.load(path) for path in (tmp_path / "records").iterdir()}
    alone = {path.name: RunRecord.load(path) for path in (whole / "records").glob("*.json")}
    assert found.keys() == alone.keys() and {record.machine.processes for record in found.values()} == {2}
    for name, record in found.items():
        assert record.epochs[-1].train_loss == pytest.approx(alone[name].epochs[-1].train_loss, rel=1e-3)
