"""Damaged checkpoints, caches, weights and folders of records, drawn with a seed: each is read, replaced, or is one
error. With `test_fuzz` these are more than 1,000 cases in under a minute."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_fuzz import WORDS, damaged, read_or_name, text_of
from test_records import MODEL, RECORD

from kernelbank.cli import main
from kernelbank.data.archive import MARKER, unpacked
from kernelbank.data.images import Loading
from kernelbank.data.load import open_data
from kernelbank.errors import InputError, SpecError
from kernelbank.exports.preprocessing import read_entry
from kernelbank.records import RecordError
from kernelbank.spec import MixerSpec
from kernelbank.studies.trained_run import read_folder
from kernelbank.train.checkpoint import VERSION, Progress, read
from kernelbank.train.runs import RunFolder, read_run
from kernelbank.weights.file import read_model_file, read_state


def cut_or_changed(whole: bytes, rng: random.Random) -> bytes:
    """The bytes cut, or with one of them replaced, or with a block of zeros."""
    at = rng.randrange(len(whole))
    changed = whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
    return rng.choice((whole[:at], changed, whole[:at] + bytes(9) + whole[at + 9 :], b""))


def test_checkpoints(tmp_path: Path) -> None:
    rng, path, count = random.Random(0), tmp_path / "checkpoint.safetensors", 0
    document = {"version": VERSION, "owner": {"seed": 0}, "progress": asdict(Progress())}
    tensors = {"model.a": torch.zeros(2, 3)}
    for _ in range(40):
        save_file(tensors, path, {"kernelbank": text_of(damaged(document, rng), rng)})
        count += read_or_name(lambda: read(path), ValueError, OSError)
    save_file(tensors, path, {"kernelbank": json.dumps(document)})
    whole = path.read_bytes()
    for _ in range(40):
        path.write_bytes(cut_or_changed(whole, rng))
        count += read_or_name(lambda: read(path), ValueError, OSError)
    assert 0 < count < 80


def test_pickles(tmp_path: Path) -> None:
    """Cut and changed, and of values that are no state dict."""
    rng, path = random.Random(0), tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.zeros(2, 3)}}, path)
    whole = path.read_bytes()
    for _ in range(40):
        path.write_bytes(cut_or_changed(whole, rng))
        read_or_name(lambda: read_state(path), InputError)
    values = (None, 3, [torch.zeros(2)], {}, {"a": 1}, {"model": {}}, {"a": torch.zeros(0)}, {1: torch.zeros(2)},
              {"a": torch.zeros(2, dtype=torch.complex64)}, {"a": torch.zeros(2).to_sparse()}, {"model": {"a": "x"}},
              {"a": torch.zeros(2, device="meta")}, {"a": torch.zeros(2, dtype=torch.int64)})  # fmt: skip
    for value in values:
        torch.save(value, path)
        read_or_name(lambda: read_model_file(path), InputError)


def test_descriptions_in_weight_files(tmp_path: Path) -> None:
    """Of this version and of version 0.1."""
    rng, path = random.Random(0), tmp_path / "weights.safetensors"
    new = {"file_version": 2, "model": MODEL.to_document(), "source": ""}
    old = {"version": 1, "architecture": {"trunk": "vit", "embed_dim": 8}, "source": ""}
    for _ in range(40):
        metadata = {rng.choice(("kernelbank", "model")): text_of(damaged(rng.choice((new, old)), rng), rng)}
        save_file({"a": torch.zeros(2)}, path, metadata)
        read_or_name(lambda: read_model_file(path), InputError)


def test_entries_of_exported_files_and_specs() -> None:
    rng = random.Random(0)
    entry = {"preprocessing": {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}, "dtype": "float32"}
    for _ in range(40):
        read_or_name(lambda: read_entry(text_of(damaged(entry, rng), rng)), ValueError, RecursionError)
    spec = json.loads(MixerSpec.parse("swin support=window(7, 3)").to_json())
    for _ in range(60):
        read_or_name(lambda: MixerSpec.from_json(text_of(damaged(spec, rng), rng)), SpecError)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(3):
                Image.fromarray(np.full((8, 8, 3), 9 * index, np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "data"


def test_the_cache_of_decoded_images(images: Path, tmp_path: Path) -> None:
    """A damaged cache is computed again, and what is read is what was decoded."""
    from kernelbank.data.decoded import decoded

    rng = random.Random(0)
    split: Any = open_data(str(images), Loading(size=(3, 8, 8), workers=0), cache=tmp_path).train
    defined = decoded(split, None, tmp_path, None)
    (marker,), (pixels,) = tmp_path.glob("decoded-*.json"), tmp_path.glob("decoded-*.npy")
    whole = pixels.read_bytes()
    values = ([99], [-1], [0.5], ["1"], "12", 3, None, [True], [10**400], float("1e308"), [[0]], {"0": 1}, [0, 0])
    for broken in values:
        marker.write_text(json.dumps({"broken": broken}))
        again = decoded(split, None, tmp_path, None)
        assert again.broken == () and np.array_equal(again.pixels, defined.pixels), broken
    for _ in range(40):
        marker.write_text(text_of(damaged({"broken": []}, rng), rng))
        pixels.write_bytes(whole[: rng.randrange(128)])
        again = decoded(split, None, tmp_path, None)
        assert again.broken == () and np.array_equal(again.pixels, defined.pixels)


def test_the_marker_of_an_archive(images: Path, tmp_path: Path) -> None:
    import tarfile

    rng, archive = random.Random(0), tmp_path / "data.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(images, ".")
    folder, digest = unpacked(archive, tmp_path / "cache")
    for _ in range(20):
        (folder / MARKER).write_text(text_of(damaged({"archive": "data.tar", "sha256": digest}, rng), rng))
        again, known = unpacked(archive, tmp_path / "cache")
        assert again == folder and isinstance(known, str) and (again / "train").is_dir()


def test_the_index_and_the_info_of_shards(tmp_path: Path) -> None:
    import tarfile

    rng, folder = random.Random(0), tmp_path / "shards"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for index in range(4):
                for name, content in ((f"{index}.png", buffer.getvalue()), (f"{index}.cls", str(index % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    def opened() -> Any:
        return open_data(f"wds/{folder}", Loading(size=(3, 8, 8), workers=0), cache=tmp_path)

    labels = opened().train.source.labels
    (index,) = tmp_path.glob("shards-*.json")
    document = json.loads(index.read_text())
    for _ in range(30):
        index.write_text(text_of(damaged(document, rng), rng))
        data = opened()
        assert data.train.source.labels == labels  # a damaged index is computed again
    stated = {"splits": {split: {"filenames": [f"{split}-0.tar"]} for split in ("train", "val")}}
    for _ in range(30):
        (folder / "_info.json").write_text(text_of(damaged(stated, rng), rng))
        read_or_name(opened, InputError)


def said(words: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it printed on stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
    return code, error.getvalue()


def test_folders_of_records(tmp_path: Path) -> None:
    """Damaged, of other versions, twice, in another encoding, with a name of control characters."""
    rng, folder = random.Random(0), tmp_path / "records"
    folder.mkdir()
    whole = replace(RECORD, recipe={"epochs": 2, "lr": 1e-3})
    document = whole.to_document()
    for _ in range(25):
        for path in folder.iterdir():
            path.unlink()
        whole.save(folder / "whole.json")
        whole.save(folder / "again.json")
        replace(whole, seed=whole.seed + 1).save(folder / "other.json")
        (folder / "a\x1b[31m.json").write_text(text_of(damaged(document, rng), rng))
        (folder / "latin.json").write_bytes(json.dumps(document).encode("utf-16"))
        (folder / "version.json").write_text(json.dumps(document | {"record_version": rng.choice((0, 99, None, "2"))}))
        runs, aside = read_folder(tmp_path)
        assert runs and len(aside) >= 2
    for words in (["report", str(tmp_path)], ["report", str(tmp_path), "--json"]):
        code, error = said(words)
        assert code == 0 and "Traceback" not in error and "\x1b" not in error, error


WILD = {"nan": float("nan"), "infinite": float("inf"), "above 100": 1e300, "negative": -5.0}


@pytest.mark.parametrize(
    ("field", "wild"),
    [*product(("val_top1", "test_top1"), WILD), *product(("train_loss", "lr"), sorted({*WILD} - {"above 100"}))],
)
def test_numbers_that_no_run_has(tmp_path: Path, wild: str, field: str) -> None:
    """Such a record is set aside by a report and is an error of a comparison; neither computes with it."""
    value, records = WILD[wild], tmp_path / "records"
    records.mkdir()
    whole = replace(RECORD, recipe={"epochs": 2, "lr": 1e-3})
    whole.save(records / "whole.json")
    replace(whole, seed=7).save(records / "other.json")
    if field == "test_top1":
        broken = replace(whole, seed=8, test_top1=value)
    elif field == "lr":
        broken = replace(whole, seed=8, recipe={"epochs": 2, "lr": value})
    else:
        broken = replace(whole, seed=8, epochs=tuple(replace(epoch, **{field: value}) for epoch in whole.epochs))
    broken.save(records / "wild.json")
    (aside,) = read_folder(tmp_path)[1]
    assert aside.file == "records/wild.json" and field in aside.reason
    code, error = said(["compare", str(records / "wild.json"), str(records / "whole.json")])
    assert code == 2 and len(error.splitlines()) == 1 and field in error


def test_runs_at_the_command_line(tmp_path: Path) -> None:
    """compare and evaluate on damaged run folders: exit code 0 or 2, and an error is one line."""
    rng = random.Random(0)
    run = {"run_version": 1, "options": {}, "model": MODEL.to_document(), "record": RECORD.to_document()}
    folder = RunFolder(tmp_path)
    for verb in ("compare", "evaluate"):
        for _ in range(20):
            folder.config.write_text(text_of(damaged(run, rng), rng))
            folder.log.write_text(text_of(damaged({"event": "epoch", "epoch": 1, "train_loss": 1.0}, rng), rng))
            read_or_name(lambda: read_run(tmp_path), InputError, RecordError)
            code, error = said([verb, str(tmp_path), str(tmp_path)] if verb == "compare" else [verb, str(tmp_path)])
            assert code in (0, 2) and "Traceback" not in error
            errors = [line for line in error.splitlines() if line.startswith("kernelbank")]
            assert len(errors) == (code == 2), error


@pytest.mark.parametrize("verb", ["explain", "export", "report", "study"])
def test_options_of_other_verbs(verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(verb)
    options = ("--layers", "--out", "--png", "--position", "--img-size", "--against", "--mixer", "--json", "--dtype",
               "--rows", "--seeds", "--shard", "--design", "--jobs", "--epochs", "--models", "--data")  # fmt: skip
    for _ in range(20):
        words = [verb, "nothing", *(rng.choice([*options, *WORDS]) for _ in range(rng.randint(0, 4)))]
        code, error = said(words)
        assert code in (0, 2) and "Traceback" not in error, words
        assert code == 0 or len(error.strip().splitlines()) <= 2, (words, error)
