"""Trackers: what Accelerate is told, with a tracker of our own in the place of a service."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from accelerate.utils import LoggerType

from kernelbank.cli import main
from kernelbank.train.tracking import scalars

WORDS = ["train", "plain", "--mixer", "vit_relpos", "--data", "digits", "--recipe", "digits", "--device", "cpu",
         "--epochs", "2", "--warmup-epochs", "1"]  # fmt: skip
TOLD: list[tuple[str, Any]] = []


class Kept(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory = "wandb", False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs

    tracker = None

    def start(self) -> None:
        TOLD.append(("start", self.kwargs))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, (int, float, str, bool)) for value in values.values())  # as TensorBoard asks
        TOLD.append(("settings", values))

    def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
        TOLD.append(("epoch", (step, values)))

    @on_main_process
    def finish(self) -> None:
        TOLD.append(("finish", None))


class NoLogin(Kept):
    def start(self) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`")


class Cut(Kept):
    def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
        raise ConnectionError("the line is cut")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    TOLD.clear()
    use(monkeypatch, Kept)


def use(monkeypatch: pytest.MonkeyPatch, kind: type[Kept]) -> None:
    import accelerate.tracking

    import kernelbank.commands.train

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", kind)
    monkeypatch.setattr(kernelbank.commands.train, "require", lambda *_: None)


@pytest.mark.usefixtures("kept")
def test_a_tracker_is_told_settings_and_epochs_and_is_closed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*WORDS, "--out", str(out), "--tracker", "wandb"]) == 0
    assert [what for what, _ in TOLD] == ["start", "settings", "epoch", "epoch", "finish"]
    start, settings, first, second = (told for _, told in TOLD[:-1])
    assert start["id"] == json.loads((out / "run.json").read_text())["id"] and start["dir"] == out
    assert settings["model"] == "plain" and settings["lr"] == 0.004 and settings["betas"] == "[0.9, 0.999]"
    assert first[0] == 1 and second[0] == 2 and 0 < second[1]["val_top1"] <= 100


def test_a_tracker_that_cannot_start_is_one_line_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, NoLogin)
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--tracker", "wandb"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "tracker: wandb cannot be started (RuntimeError: No API key configured. Use `wandb login`)" in line
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_tracker_that_fails_on_the_way_does_not_end_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Cut)
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--tracker", "wandb"]) == 0
    assert "a tracker failed in epoch 1 (ConnectionError: the line is cut)" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_for_real(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*WORDS, "--out", str(tmp_path / "run"), "--tracker", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "kernelbank"))
    events.Reload()
    assert [event.step for event in events.Scalars("val_top1")] == [1, 2]


def test_settings_as_scalars() -> None:
    assert scalars({"a": 1, "b": (1, 2), "c": None, "d": True}) == {"a": 1, "b": "(1, 2)", "c": "None", "d": True}
