"""The runner: nothing finished is repeated, and nothing broken is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from studies.small_study import numbers, study
from torch import nn

from kernelbank.analysis.cost import model_cost
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

DIGITS = Conditions(source=DataOptions(data="digits"), hardware=Hardware(device="cpu"))


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


def test_records_of_other_code_are_pointed_out(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next((whole / "records").glob("*-relu-*.json"))
    text = path.read_text()
    record = RunRecord.load(path)
    replace(record, code=replace(record.code, sources="0" * 64)).save(path)
    assert study(whole) == 0
    path.write_text(text)
    assert "1 of 2 records were made by another state of the code than this one" in capsys.readouterr().out


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
