"""Weights from and to files: whole or an error, and never code."""

from __future__ import annotations

import argparse
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kernelbank.errors import InputError
from kernelbank.weights.contents import ENTRIES, find
from kernelbank.weights.file import read_state, write_state
from kernelbank.weights.pickles import Setting, read_pickle

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int64)}


class Code:
    """Unpickling this runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path / "x.safetensors", STATE, {"who": "us"})
    contents = read_state(tmp_path / "x.safetensors")
    assert equal(contents.state, STATE) and contents.metadata == {"format": "pt", "who": "us"}
    other = tmp_path / "other"
    other.touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == other.stat().st_mode


def test_views_and_shared_tensors_are_written(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"all": base, "same": base, "rows": base[1:], "turned": base.t()}
    write_state(tmp_path / "x.safetensors", state, {})
    assert equal(read_state(tmp_path / "x.safetensors").state, state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_torch_are_read(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    assert equal(read_state(path).state, STATE)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_and_prefixes_are_taken_off(entry: str) -> None:
    prefixed = {f"module.{key}": value for key, value in STATE.items()}
    found = find({entry: prefixed, "epoch": 3, "optimizer": {}}, "it")
    assert equal(found.state, STATE) and found.entry == (entry,) and found.prefix == "module."
    assert equal(find({"state_dict": {"model": STATE}}, "it").state, STATE)
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert find(mixed, "it").state.keys() == mixed.keys() and find(mixed, "it").notes == ()


def test_prefixes_in_any_order_are_removed_only_where_all_keys_have_them() -> None:
    for prefix in ("module._orig_mod.model.", "_orig_mod.module.", "model.net.", "model.model."):
        found = find({prefix + key: value for key, value in STATE.items()}, "it")
        assert equal(found.state, STATE) and found.prefix == prefix
    alone = {"model.": torch.ones(1)}
    assert find(alone, "it").state.keys() == alone.keys()


def test_averaged_weights_and_teachers_are_taken_first_and_said() -> None:
    averaged = {key: value + 1 for key, value in STATE.items()}
    for taken, other in [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("teacher", "student")]:
        checkpoint = {other: STATE, taken: averaged}
        found = find(checkpoint, "it")
        assert equal(found.state, averaged)
        assert found.notes == (f"taken: the weights under {taken}, not {other} (--entry takes another)",)
        assert equal(find(checkpoint, "it", other).state, STATE) and find(checkpoint, "it", other).others == (taken,)
    with pytest.raises(InputError, match="no entry 'modell'; did you mean 'model'"):
        find({"model": STATE}, "it", "modell")
    with pytest.raises(InputError, match="expected one of none, as its weights lie at the top"):
        find(STATE, "it", "model")


def test_settings_of_training_scripts_are_read_and_not_built(tmp_path: Path) -> None:
    """A Namespace with paths, NumPy's numbers and arrays: what torch refuses in a plain weights-only load."""
    settings = argparse.Namespace(output=Path("out"), lr=np.float64(0.1), betas=[np.int64(1)], rng=np.arange(3))
    checkpoint = {"model": STATE, "args": settings, "epoch": 3, "random": np.random.default_rng(0).bit_generator.state}
    for legacy in (False, True):
        torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        assert equal(read_state(tmp_path / "x.pth").state, STATE)
        loaded = read_pickle(tmp_path / "x.pth")
        assert type(loaded["args"]) is Setting and vars(loaded["args"]) == {}
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize(("loaded", "match"), [
    ([1, 2], "no state dict, but list"), ({}, "no state dict, but nothing"), (None, "no state dict, but NoneType"),
    ({"epoch": 3, "lr": 0.1}, "epoch, lr are no tensors"), ({"model": {"a": torch.ones(1), "n": 3}}, "n is no tensor"),
])  # fmt: skip
def test_what_is_no_state_dict_is_an_error(loaded: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        find(loaded, "it")


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": STATE, "config": Code(marker)}, tmp_path / "a.pth")
    torch.save({"model": STATE, "config": Code(marker)}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "c.bin").write_bytes(pickle.dumps(Code(marker), protocol=2))
    (tmp_path / "d.bin").write_bytes(pickle.dumps(Code(marker)))
    for name, match in [
        ("a.pth", r"posix\.mkdir|nt\.mkdir"),
        ("b.pth", "mkdir"),
        ("c.bin", "mkdir"),
        ("d.bin", "d.bin"),
    ]:
        with pytest.raises(InputError, match=match):
            read_state(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "safetensors"])
def test_damaged_files_are_one_error(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, or with bytes of its header overwritten: refused, or read as tensors; nothing else is raised."""
    path = tmp_path / f"x.{kind}"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "pth")
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            for _ in range(10):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for path, match in [(tmp_path / "no.pth", "no such file"), (tmp_path / "x.npz", r"unknown kind of file '\.npz'")]:
        with pytest.raises(InputError, match=match):
            read_state(path)
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="not a file"):
        read_state(tmp_path / "folder.pth")
    for path, match in [(tmp_path / "x.pth", r"expected \.safetensors"), (tmp_path / "folder.safetensors", "a folder"),
                        (tmp_path / "none" / "x.safetensors", "no such folder"),
                        (tmp_path / ("x" * 400 + ".safetensors"), "cannot be written")]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            write_state(path, STATE, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.pth", "folder.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_state(path, STATE, {})

    def full(tensors: object, beside: Path, metadata: object) -> None:
        beside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kernelbank.weights.file.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        write_state(path, {"a": torch.zeros(1)}, {})
    assert equal(read_state(path).state, STATE) and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_metadata_is_plain_text(tmp_path: Path) -> None:
    write_state(tmp_path / "x.safetensors", STATE, {"dialect": "timm"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata()["dialect"] == "timm"
