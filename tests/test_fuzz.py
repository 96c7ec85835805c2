"""Damaged files and odd options, drawn with a seed: each is read, or is one error that names what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_records import MODEL, RECORD

from kernelbank.atlas import ROWS
from kernelbank.cli import main
from kernelbank.errors import InputError, SpecError
from kernelbank.model import ModelSpec
from kernelbank.nn.build import build
from kernelbank.records import RecordError, RunRecord
from kernelbank.spec import MixerSpec
from kernelbank.train.model import describe
from kernelbank.train.runs import RunFolder
from kernelbank.weights.file import read_model_file, save_model

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**63, 10**400, 0.5, float("1e308"), "", "x", "nan", "vit", "\x00", "é" * 300, [], [[]],
    ["vit"], [-1, 7], {}, {"a": {}}, {"model_version": 99},
)  # fmt: skip
WORDS = ("-1", "0", "0.5", "nan", "1e300", str(2**64), "x", "", "--", "vit", "softmax", "[", "{", "é", "a=b", "None")


def damaged(document: Any, rng: random.Random) -> Any:
    """The document with a few fields replaced, removed or added, at any depth."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        place = document
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            match rng.randrange(4):
                case 0 if isinstance(place, dict):
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[rng.choice(("colour", "", "trunk"))] = copy.deepcopy(rng.choice(VALUES))
                case _:
                    place[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return document


def read_or_name(read: Callable[[], object], *errors: type[Exception]) -> bool:
    """Whether `read` reads; else it raises one of the errors, with a message of one line."""
    try:
        read()
    except errors as error:
        assert str(error) and "\n" not in str(error), error
        return False
    return True


def text_of(document: Any, rng: random.Random) -> str:
    """JSON, sometimes cut or nested too deep."""
    text = json.dumps(document)
    return rng.choice((text, text, text, text, text[: rng.randrange(len(text))], "[" * 100_000))


@pytest.mark.parametrize("part", range(5))
def test_run_records(part: int, tmp_path: Path) -> None:
    rng, path, read = random.Random(part), tmp_path / "record.json", 0
    document = RECORD.to_document()
    for _ in range(40):
        path.write_text(text_of(damaged(document, rng), rng))
        read += read_or_name(lambda: RunRecord.load(path), RecordError)
    assert read < 40


@pytest.mark.parametrize("part", range(2))
def test_run_folders(part: int, tmp_path: Path) -> None:
    rng, folder = random.Random(part), RunFolder(tmp_path)
    run = {"run_version": 1, "options": {}, "model": MODEL.to_document(), "record": RECORD.to_document()}
    for _ in range(40):
        folder.config.write_text(text_of(damaged(run, rng), rng))
        read_or_name(folder.read_config, InputError)
        lines = [json.dumps({"event": "epoch", "epoch": 1}), text_of(damaged({"event": "x", "a": [1]}, rng), rng)]
        rng.shuffle(lines)
        folder.log.write_text("\n".join(lines))
        assert any(event["event"] == "epoch" for event in folder.events())


def test_model_descriptions() -> None:
    rng = random.Random(0)
    for _ in range(80):
        read_or_name(lambda: ModelSpec.from_document(damaged(MODEL.to_document(), rng)), ValueError)


def test_specs() -> None:
    rng, rows = random.Random(0), list(ROWS)
    cells = ("activation=relu,count", "size=3", "mix=project(8)", "bank=static(4C)", "support=window(7, 3)")
    for _ in range(100):
        text = " ".join([rng.choice(rows), *rng.sample(cells, rng.randint(0, 3))])
        at = rng.randrange(len(text))
        text = rng.choice((text[:at] + rng.choice(WORDS) + text[at:], text[:at], text + "=" + rng.choice(WORDS)))
        read_or_name(lambda text=text: MixerSpec.parse(text).at_block(1), SpecError)


def test_model_arguments() -> None:
    rng = random.Random(0)
    names = (
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "drop_rate",
        "img_size",
        "qkv_bias",
        "norm_layer",
        "colour",
    )
    small = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    for _ in range(60):
        arguments = small | {rng.choice(names): rng.choice([*VALUES, *WORDS]) for _ in range(2)}
        if max((v for v in arguments.values() if isinstance(v, int)), default=0) > 10**6:
            continue  # a model that large is a question of memory

        def make(arguments: dict[str, Any] = arguments) -> object:
            return build(describe("plain", arguments=arguments, img_size=(8, 8), in_chans=1, num_classes=2))

        read_or_name(make, InputError, SpecError)


def test_weight_files(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "weights.safetensors"
    save_model(path, {"a": torch.zeros(2, 3)}, MODEL)
    whole = path.read_bytes()
    for _ in range(40):
        at = rng.randrange(len(whole))
        path.write_bytes(rng.choice((whole[:at], whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])))
        read_or_name(lambda: read_model_file(path), InputError)
    save_file({"a": torch.zeros(2)}, path, metadata={"kernelbank": "[" * 1000})
    assert not read_or_name(lambda: read_model_file(path), InputError)


@pytest.mark.parametrize("part", range(3))
def test_options(part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options of every verb with values of any kind: the exit code is 0 or 2, and an error is one line."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(part)
    options = ("--recipe", "--lr", "--epochs", "--batch-size", "--seed", "--mixer", "--grid", "--dim", "--json",
               "--out", "--models", "--rows", "--prove", "--data")  # fmt: skip
    for _ in range(20):
        verb = rng.choice((["train", "plain", "--show"], ["atlas"], ["train", "--show"], ["study", "nothing"],
                           ["compare"], ["evaluate"], ["convert"], ["benchmark", "--explain"]))  # fmt: skip
        words = [*verb, *(rng.choice([*options, *WORDS]) for _ in range(rng.randint(1, 4)))]
        if "--prove" in words:
            continue
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main(words)
            except SystemExit as stop:  # --help
                code = stop.code if isinstance(stop.code, int) else 2
        assert code in (0, 2), words
        assert "Traceback" not in error.getvalue()
        if code == 2:
            assert len(error.getvalue().strip().splitlines()) <= 2, (words, error.getvalue())
