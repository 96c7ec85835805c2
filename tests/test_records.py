"""Run records: an exact round trip, and one clear error for every file that is not a record."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kernelbank.errors import InputError
from kernelbank.files import replace_file, replace_text, set_aside, sole_user, writable_folder
from kernelbank.records import CodeIdentity, DataIdentity, EpochResult, MachineIdentity, RecordError, RunRecord
from kernelbank.zoo import SMALL

MODEL = replace(SMALL["plain"], mixer="vit", mlp="ffn", img_size=(8, 8), in_chans=1, num_classes=10)
RECORD = RunRecord(
    study="softmax", row="relu", model=MODEL,
    recipe={"lr": 0.004, "clip_grad": None}, data=DataIdentity("digits", "ab", 3, 2, 1), seed=0,
    code=CodeIdentity.here(), machine=MachineIdentity.here(1), params=10, macs=20,
    epochs=(EpochResult(2.0, 1.0 / 3.0, 50.0, 0.5), EpochResult(1.0, 0.5, 250 / 3, 0.25)),
    test_loss=0.5, test_top1=100 / 3, failure=None,
)  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    RECORD.save(path)
    assert RunRecord.load(path) == RECORD
    assert list(tmp_path.iterdir()) == [path]
    document = json.loads(path.read_text())
    assert list(document) == sorted(document)
    assert (RECORD.best_val_top1, RECORD.seconds) == (250 / 3, 0.75)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    wild = (EpochResult(math.inf, -math.inf, math.nan, 1.0),)
    replace(RECORD, epochs=wild, test_top1=None, failure="diverged").save(path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    (epoch,) = RunRecord.load(path).epochs
    assert (epoch.train_loss, epoch.val_loss) == (math.inf, -math.inf) and math.isnan(epoch.val_top1)


@pytest.mark.parametrize("cut", [0, 1, 40, 400])
def test_a_cut_record_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.json"
    path.write_text(RECORD.to_json()[:cut])
    with pytest.raises(RecordError, match=r"run\.json is not a run record"):
        RunRecord.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"record_version": 3}, "record_version"),
        ({"seed": "0"}, "seed='0'; expected int"),
        ({"seed": 10**400}, "invalid .*seed="),
        ({"seed": True}, "seed=True; expected int"),
        ({"params": None}, "params=None; expected int"),
        ({"test_top1": "high"}, "test_top1='high'; expected"),
        ({"epochs": [{"train_loss": 1.0}]}, r"epochs\[0\] lacks the field 'val_loss'"),
        ({"data": []}, "invalid record.data; expected a JSON object"),
    ],
)
def test_a_foreign_record_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(RECORD.to_json()) | change))
    with pytest.raises(RecordError, match=message):
        RunRecord.load(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"record_version": 1}', "\x00"])
def test_other_json_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="is not a run record"):
        RunRecord.load(path)


def test_binary_and_absent_files_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    for name in ("a.json", "b.json"):
        with pytest.raises(RecordError, match=name):
            RunRecord.load(tmp_path / name)


def test_set_aside_keeps_every_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in "abc":
        path.write_text(text)
        set_aside(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "run.json.broken": "a", "run.json.broken.2": "b", "run.json.broken.3": "c",
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    replace_text(path, "old")

    def fail(beside: Path) -> None:
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_user_and_left_overs_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    left = [tmp_path / "records" / "run.json.123.tmp", tmp_path / "table.md.7.tmp"]
    names = ("probe", "mine.tmp", "table.md.tmp", "records/mine.tmp", "records/deep/run.json.1.tmp", ".lock")
    others = [tmp_path / name for name in names]
    (tmp_path / "records" / "deep").mkdir()
    (tmp_path / "records" / "folder.json.1.tmp").mkdir()
    for path in left + others:
        path.write_text("mine")
    with sole_user(writable_folder(tmp_path), ("table.md", "records/*.json")):
        assert not any(path.exists() for path in left)
        assert all(path.read_text() == "mine" for path in others) and (tmp_path / "records/folder.json.1.tmp").exists()
        with pytest.raises(InputError, match="in use"), sole_user(tmp_path):
            pass
    with sole_user(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"invalid out=.*file/out: it cannot be written to"):
        writable_folder(tmp_path / "file" / "out")
