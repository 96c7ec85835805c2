"""The runner: nothing finished is repeated, nothing broken is lost, a killed study ends with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelbank.analysis.cost import model_cost
from kernelbank.cli import main
from kernelbank.data.load import load
from kernelbank.errors import InputError
from kernelbank.records import RunRecord
from kernelbank.studies import run as runs
from kernelbank.studies import runner, session
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.run import Conditions, Run, grid
from kernelbank.studies.runner import WorkerPool
from kernelbank.studies.study import changed, named_host
from kernelbank.train.checkpoint import Progress, State, save
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipes import digits_recipe
from kernelbank.train.request import DataOptions
from kernelbank.train.session import Hooks
from kernelbank.train.signals import stop_on_signal

DIGITS = Conditions(source=DataOptions(data="digits"), hardware=Hardware(device="cpu"))
WORDS = ["study", "softmax", "--models", "plain", "--rows", "softmax", "relu", "--seeds", "0", "--epochs", "2"]


def study(folder: Path, *words: str) -> int:
    return main([*WORDS, "--out", str(folder), "--jobs", "1", *words])


def numbers(folder: Path) -> dict[str, object]:
    """Every record by name, without what may differ from one execution to the next."""
    found: dict[str, object] = {}
    for path in sorted((folder / "records").glob("*.json")):
        record = RunRecord.load(path)
        epochs = tuple(replace(epoch, seconds=0.0, waited=None) for epoch in record.epochs)
        found[path.name] = replace(record, epochs=epochs, code=None, machine=None)  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert study(folder) == 0
    return folder


def test_outputs(whole: Path) -> None:
    records = [RunRecord.load(path) for path in (whole / "records").iterdir()]
    assert {record.row for record in records} == {"softmax", "relu"}
    for record in records:
        assert len(record.epochs) == 2 and record.test_top1 is not None and record.failure is None
        assert record.recipe["epochs"] == 2 and record.machine.threads == 1
        assert record.macs == model_cost(record.model).macs
    assert not list((whole / "checkpoints").iterdir())
    assert (whole / "study.png").read_bytes().startswith(b"\x89PNG")
    document, text = json.loads((whole / "table.json").read_text()), (whole / "table.md").read_text()
    assert [row["row"] for row in document["rows"]] == ["softmax", "relu"]
    assert document["rows"][1]["changed"] == {"activation": "relu,count"}
    assert document["rows"][1]["roles"] == ["non-linearity"]
    assert "demonstration on digits: no verdicts" in text and "| relu | activation=relu,count |" in text


def test_finished_runs_are_not_repeated(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in (whole / "records").iterdir()}
    table = (whole / "table.md").read_bytes()

    def fail(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(runner, "execute", fail)
    assert study(whole) == 0
    assert {path.name: path.read_bytes() for path in (whole / "records").iterdir()} == before
    assert (whole / "table.md").read_bytes() == table


def test_a_broken_record_is_named_set_aside_and_repeated(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = numbers(whole)
    path = next((whole / "records").glob("*-relu-*.json"))
    path.write_text(path.read_text()[:300])
    assert study(whole) == 0
    complaint = capfd.readouterr().err
    assert f"{path.name} is not a run record" in complaint and f"set aside as {path.name}.broken" in complaint
    assert numbers(whole) == before and path.with_name(path.name + ".broken").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row": "softmax"}, "its row differs"),
        ({"seed": 7}, "its seed differs"),
        ({"test_top1": "nan"}, "has a test_top1 of nan and no failure"),
        ({"epochs": 1}, "holds 1 of 2 epochs and no failure"),
    ],
)
def test_a_record_of_another_run_or_a_part_is_set_aside(tmp_path: Path, change: dict[str, object], said: str) -> None:
    run = some_runs()[1]
    record = runs.execute(run, DIGITS, folder_of(tmp_path), Hooks())
    path, told = run.record_path(tmp_path), list[str]()
    assert runner.finished([run], tmp_path, told.append) == {run: record} and not told
    document = json.loads(path.read_text())
    if change.get("epochs"):
        change = {"epochs": document["epochs"][:1]}
    path.write_text(json.dumps(document | change))
    assert runner.finished([run], tmp_path, told.append) == {}
    assert len(told) == 1 and said in told[0] and "\n" not in told[0] and not path.exists()


def folder_of(path: Path) -> Path:
    runner.make_folders(path)
    return path


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("taken", ["records", ".lock", "checkpoints"])
def test_a_path_that_is_taken_is_one_line(
    tmp_path: Path, taken: str, jobs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if taken == ".lock":
        (tmp_path / taken).mkdir()
    else:
        (tmp_path / taken).write_text("")
    assert study(tmp_path, "--jobs", jobs) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"kernelbank: error: {tmp_path / taken}: ") and "Traceback" not in last


def test_an_error_of_the_user_travels_from_a_worker_as_itself(tmp_path: Path) -> None:
    runs_of = some_runs()[:2]
    for run in runs_of:
        folder_of(tmp_path)
        state = State(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), None, Progress())
        save(run.checkpoint_path(tmp_path), {}, state, Engine(Hardware(device="cpu")))
    with pytest.raises(InputError, match="belongs to another run"):
        runner.run_all(runs_of, DIGITS, folder_of(tmp_path), WorkerPool(2), lambda event: None)


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
    words = [sys.executable, "-m", "kernelbank", *WORDS, "--epochs", "500", "--jobs", "2"]
    for index, moment in enumerate(("study softmax", ".lock", "checkpoints")):
        out = tmp_path / str(index)
        process = subprocess.Popen(
            [*words, "--out", str(out)], start_new_session=True, text=True, env={**os.environ, **path_env()},
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


def test_records_of_other_code_are_pointed_out(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((whole / "records").glob("*-relu-*.json"))
    text = path.read_text()
    record = RunRecord.load(path)
    replace(record, code=replace(record.code, sources="0" * 64)).save(path)
    assert study(whole) == 0
    path.write_text(text)
    assert "1 of 2 records were made by another state of the code than this one" in capsys.readouterr().out


def test_a_killed_study_ends_with_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kernelbank", *WORDS, "--out", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **path_env()}
    )
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
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **path_env()}, text=True
    )
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
                          env={**os.environ, **path_env(), "OMP_NUM_THREADS": "1"}, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 runs, 0 finished before") == 1 and done.stdout.count("table.md") == 1
    found = {path.name: RunRecord.load(path) for path in (tmp_path / "records").iterdir()}
    alone = {path.name: RunRecord.load(path) for path in (whole / "records").glob("*.json")}
    assert found.keys() == alone.keys() and {record.machine.processes for record in found.values()} == {2}
    for name, record in found.items():
        assert record.epochs[-1].train_loss == pytest.approx(alone[name].epochs[-1].train_loss, rel=1e-3)


def path_env() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_diverged_run_is_recorded_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = runs.build

    def build(run: Run) -> object:
        model = real(run)
        if run.row == "relu":
            model.head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(runs, "build", build)
    assert study(tmp_path) == 0
    records = [RunRecord.load(path) for path in (tmp_path / "records").iterdir()]
    (failed,) = [record for record in records if record.failure]
    assert failed.row == "relu" and failed.test_top1 is None and failed.epochs == ()
    assert failed.failure == "training loss nan at epoch 1, step 1, lr 4e-05"
    shown = capsys.readouterr().out
    assert "diverged: plain relu, seed 0: training loss nan" in shown
    assert study(tmp_path) == 0  # a recorded failure is not repeated: the same run would diverge again


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "execute", interrupt)
    assert study(tmp_path) == 130
    assert "run the same command to resume" in capsys.readouterr().err


def test_a_crash_of_a_worker_is_reported(tmp_path: Path) -> None:
    (run,) = some_runs()[:1]
    broken = replace(run, model=replace(run.model, mixer="vit kernel=two_step(7)"))
    with pytest.raises(runner.WorkerError, match="expected a multiple of 7, the number of heads") as caught:
        runner.run_all([broken, broken], DIGITS, folder_of(tmp_path), WorkerPool(2), lambda event: None)
    assert "Traceback" in caught.value.detail and "\n" not in str(caught.value)


def test_a_failed_worker_is_told_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise runner.WorkerError("a worker process ended unasked (exit code -9)", "Traceback: here\n")

    monkeypatch.setattr(session, "run_all", fail)
    assert study(tmp_path) == 1
    complaint = capsys.readouterr().err
    assert "ended unasked (exit code -9)" in complaint and "the same command resumes the study" in complaint
    assert "Traceback" not in complaint and complaint.splitlines()[-1].startswith("kernelbank: error: a worker")
    assert study(tmp_path, "--debug") == 1
    assert "Traceback: here\n" in capsys.readouterr().err


def some_runs() -> tuple[Run, ...]:
    study, hosts = STUDIES["softmax"](), []
    for name, cells in DESIGNS["digits"].hosts.items():
        host = named_host(name, cells)
        hosts.append(({row: changed(host, study.row(row)) for row in ("softmax", "relu")}, load("digits").identity))
    return grid(study, hosts=hosts, seeds=(0, 1), recipe=digits_recipe(2))


def test_keys_are_readable_and_tell_runs_apart() -> None:
    listed = some_runs()
    keys = [run.key for run in listed]
    assert len(set(keys)) == len(keys) == 8
    assert keys[0].startswith("softmax-plain-softmax-seed0-") and [run.seed for run in listed] == [0] * 4 + [1] * 4
    first = listed[0]
    changes: list[Run] = [
        replace(first, recipe=replace(first.recipe, lr=0.5)),
        replace(first, data=replace(first.data, sha256="0")),
        replace(first, model=replace(first.model, mixer="vit")),
        replace(first, model=replace(first.model, mlp="none")),
        replace(first, study="depthwise"),
    ]
    assert len({first.key, *(run.key for run in changes)}) == 6
