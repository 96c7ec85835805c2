"""`kernelbank train`, `evaluate` and `compare` as a person meets them: what works, and one line for every fault."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kernelbank.cli import main
from kernelbank.records import RunRecord
from kernelbank.train.progress import Watch
from kernelbank.train.runs import RunFolder, read_run

Capture = pytest.CaptureFixture[str]
DIGITS = ["plain", "--mixer", "vit_relpos", "--data", "digits", "--recipe", "digits", "--device", "cpu"]
SHORT = ["--epochs", "2", "--warmup-epochs", "1"]
SMALL = ["--img-size", "16", "--recipe", "cifar10", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8",
         "--drop-path", "0", "--workers", "0", "--device", "cpu"]  # fmt: skip


def images(
    folder: Path, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("cat", "dog")
) -> Path:
    """An ImageFolder of tiny JPEGs, 20 of every class."""
    for split in splits:
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(20):
                colour = (index * 12, 60 + 120 * label, 255 - index * 10)
                Image.new("RGB", (20, 18), colour).save(folder / split / name / f"{index:02}.jpg")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "pets")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", *DIGITS, *SHORT, "--ema", "0.9", "--out", str(out)]) == 0
    return out


def failing(capsys: Capture, *words: str, code: int = 2) -> str:
    """The one line that the command leaves, after what it told on its way."""
    assert main(list(words)) == code
    *_, last = capsys.readouterr().err.strip().splitlines()
    return last


# ---- what works ----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_whole_story(trained: Path) -> None:
    record, config = RunRecord.load(trained / "record.json"), json.loads((trained / "run.json").read_text())
    assert len(record.epochs) == 2 and record.test_top1 is not None and record.failure is None
    assert record.mixer == "vit_relpos" and record.model.name == "plain" and record.seed == 0
    assert record.recipe["lr"] == 0.004 and record.recipe["epochs"] == 2 and config["recipe"] == record.recipe
    assert record.epochs[0].val_top5 is not None and record.epochs[1].ema_top1 is not None
    events = list(RunFolder(trained).events())
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2] and events[-1]["event"] == "end"
    assert sum(e["event"] == "step" for e in events) == 46
    assert (trained / "weights.safetensors").exists() and (trained / "ema.safetensors").exists()
    assert read_run(trained) == record


def test_a_finished_run_is_not_repeated(trained: Path, capsys: Capture) -> None:
    before = (trained / "record.json").read_bytes(), (trained / "log.jsonl").read_bytes()
    assert main(["train", "--resume", "--out", str(trained)]) == 0
    assert ((trained / "record.json").read_bytes(), (trained / "log.jsonl").read_bytes()) == before
    assert "test top-1" in capsys.readouterr().out


def test_evaluate_reads_what_training_measured(trained: Path, capsys: Capture) -> None:
    record = RunRecord.load(trained / "record.json")
    for words, expected in (([], record.epochs[-1].val_top1), (["--split", "test"], record.test_top1),
                            (["--ema"], record.epochs[-1].ema_top1)):  # fmt: skip
        assert main(["evaluate", str(trained), "--device", "cpu", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(expected)


def test_a_trained_mixer_is_swapped_and_tuned(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = ["--initial-checkpoint", str(trained / "weights.safetensors")]
    words = ["train", "plain", "--data", "digits", "--recipe", "finetune", "--epochs", "1", "--warmup-epochs", "0",
             "--batch-size", "48", "--device", "cpu", *weights]  # fmt: skip
    assert main([*words, "--mixer", "activation=relu,count", "--out", str(tmp_path / "relu")]) == 0
    told = capsys.readouterr().err
    assert RunRecord.load(tmp_path / "relu" / "record.json").mixer == "vit_relpos activation=relu,count"
    assert "kept" in told and "vit_relpos activation=relu,count" in told
    assert main(["evaluate", "plain", "--data", "digits", "--device", "cpu", "--json", *weights]) == 0
    found = json.loads(capsys.readouterr().out)["top1"]
    assert found == pytest.approx(RunRecord.load(trained / "record.json").epochs[-1].val_top1)


def test_weights_take_a_new_head_and_another_resolution(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model = ["train", "vit_kb_test_patch16_64", "--mixer", "vit_relpos", *SMALL]
    assert main([*model, "--data", str(folder), "--img-size", "32", "--out", str(tmp_path / "first")]) == 0
    more = images(tmp_path / "more", classes=("cat", "dog", "fox"))
    weights = ["--initial-checkpoint", str(tmp_path / "first" / "weights.safetensors"), "--layer-decay", "0.7"]
    capsys.readouterr()
    second = ["--data", str(more), "--img-size", "64", "--out", str(tmp_path / "second")]
    assert main(["train", "vit_kb_test_patch16_64", *SMALL, *second, *weights]) == 0
    told = capsys.readouterr().err
    assert "head.weight: [2, " in told and "[3, " in told and "in the model: new" in told
    record = RunRecord.load(tmp_path / "second" / "record.json")
    assert record.model.img_size == (64, 64) and record.mixer == "vit_relpos"


def test_folders_are_read_split_and_trained(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert main(["train", "plain", "--data", str(folder), *SMALL, "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["data"]["train"], record["data"]["val"], record["data"]["test"]) == (36, 4, 40)


def test_small_images_for_a_large_model_are_told(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["train", "vit_kb_test_patch16_64", "--data", str(folder), *SMALL[2:], "--out"]
    assert main([*words, str(tmp_path / "silent")]) == 0
    assert (
        "the first image is 18 x 20 and is enlarged to the model's 64 x 64; --img-size N sets another size"
        in capsys.readouterr().err
    )
    assert main([*words, str(tmp_path / "chosen"), "--img-size", "64"]) == 0
    assert "enlarged" not in capsys.readouterr().err


def test_compare_draws_and_tells(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    paths = [str(trained)]
    for seed in (0, 1):
        out = tmp_path / f"relu{seed}"
        words = [*SHORT, "--ema", "0.9", "--seed", str(seed), "--out", str(out)]
        assert main(["train", *DIGITS, "--mixer", "vit_relpos activation=relu,count", *words]) == 0
        paths.append(str(out))
    figure = tmp_path / "curves.svg"
    capsys.readouterr()
    assert main(["compare", *paths, "--figure", str(figure), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["label"], row["seeds"]) for row in rows] == [
        ("vit_relpos", [0]),
        ("vit_relpos activation=relu,count", [0, 1]),
    ]
    assert rows[0]["difference"] is None and rows[1]["difference"]["half"] is None  # one seed on one side
    assert figure.read_text().startswith("<?xml") and "vit_relpos" in figure.read_text()
    assert main(["compare", *paths, "--figure", str(figure)]) == 0
    assert "±" in capsys.readouterr().out


def test_the_resolved_recipe_beside_the_paper(capsys: Capture) -> None:
    assert main(["train", "vit_kb_small_patch16_224", "--recipe", "paper", "--show", "--batch-size", "256"]) == 0
    shown = capsys.readouterr().out
    assert "not stated: taken from deit" in shown and "overridden; paper has 1024" in shown
    assert "0.00025" in shown  # the rate for a quarter of the batch


# ---- faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "a model is missing"),
        (["train", "plain"], "--data is missing"),
        (["train", "plian", "--data", "digits"], "unknown model 'plian'; did you mean 'plain'"),
        (["train", "plain", "--data", "digits", "--recipe", "diet"], "unknown recipe 'diet'; did you mean 'deit'"),
        (["train", "plain", "--data", "digits", "--epoch", "3"], "unknown option --epoch; did you mean '--epochs'"),
        (["train", *DIGITS, "--epochs", "0"], "recipe: invalid epochs=0; expected"),
        (["train", *DIGITS, "--scale", "0.5", "0.1"], "recipe: invalid scale=(0.5, 0.1); expected"),
        (["train", *DIGITS, "--lr", "fast"], "--lr"),
        (["train", "plain", "--data", "nowhere", "--img-size", "8"], "'nowhere' is not a data set and not a path"),
        (["train", *DIGITS, "--mixer", "vit kernel=full"], "invalid kernel=full: "),
        (["train", *DIGITS, "--model-args", "depth"], "invalid --model-args 'depth'; expected NAME=VALUE"),
        (["train", *DIGITS, "--model-args", "widht=3"], "unknown model_args 'widht'; expected one of patch_size"),
        (["train", *DIGITS, "--batch-size", "5000", "--drop-last"], "invalid batch_size=5000 for 1077"),
        (["train", *DIGITS, "--micro-batch", "0"], "invalid micro_batch=0 for"),
        (["train", *DIGITS, "--mixup", "0.8"], "expected an even batch_size with drop_last=True"),
        (
            ["train", *DIGITS, "--tracker", "trackio"],
            "tracker trackio needs trackio: pip install 'kernelbank[trackio]'",
        ),
        (["train", *DIGITS, "--initial-checkpoint", "no.safetensors"], "no.safetensors: no such file"),
        (["train", *DIGITS, "--resume"], "holds no run"),
        (["evaluate", "nowhere", "--data", "digits"], "unknown model 'nowhere'"),
        (["evaluate", "plain", "--data", "digits"], "as a model it has no weights"),
        (["compare"], "RUN"),
        (["compare", "nowhere"], "nowhere is not the folder of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_line(
    words: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = failing(capsys, *words)
    assert said in line and line.startswith("kernelbank") and not list(tmp_path.rglob("record.json"))


def cut_class(folder: Path) -> None:
    for path in (folder / "train" / "cat").iterdir():
        path.unlink()


def rename_class(folder: Path) -> None:
    (folder / "test" / "cat").rename(folder / "test" / "lion")


def no_train(folder: Path) -> None:
    shutil.rmtree(folder / "train")


def all_text(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))


def many_broken(folder: Path) -> None:
    for path in sorted((folder / "train" / "dog").iterdir())[:9]:
        path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_class, "train/cat holds no image (1 of 2 are empty)"),
        (rename_class, "test has 2 classes, the train split 2: 1 missing (cat) and 1 unknown (lion)"),
        (no_train, "has no train split"),
        (all_text, "train holds no images that can be read"),
        (many_broken, "images cannot be read, more than the share of 0.001 that max_broken allows; the first is dog/0"),
    ],
)
def test_data_that_cannot_be_used_are_one_line(
    harm: Callable[[Path], None], said: str, folder: Path, capsys: Capture, tmp_path: Path
) -> None:
    harm(folder)
    words = ["train", "plain", "--data", str(folder), *SMALL, "--batch-size", "6", "--out", str(tmp_path / "run")]
    assert said in failing(capsys, *words)


def test_a_folder_that_cannot_be_read(
    folder: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("train/dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # a test may run as root, who reads everything
    line = failing(capsys, "train", "plain", "--data", str(folder), *SMALL, "--out", str(tmp_path / "run"))
    assert line.endswith("train/dog cannot be read: Permission denied")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_few_broken_images_are_named_and_counted(workers: str, folder: Path, capsys: Capture, tmp_path: Path) -> None:
    for name in ("train/dog/07.jpg", "train/cat/11.jpg", "test/dog/03.jpg"):
        (folder / name).write_bytes(b"not an image")
    words = ["train", "plain", "--data", str(folder), *SMALL, "--workers", workers, "--max-broken", "0.2"]
    assert main([*words, "--batch-size", "6", "--out", str(tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "broken image dog/07.jpg" in err and "broken image dog/03.jpg" in err
    assert "2 broken images so far" in err and json.loads(out)["epochs"][0]["broken"] == 2
    assert main(["evaluate", str(tmp_path / "run"), "--split", "test", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], found["unreadable"]) == (39, 1)


def packed(path: Path, folder: Path, *extra: tuple[str, str]) -> Path:
    """An archive of `folder`, and members (name, kind) that do not belong there."""
    with tarfile.open(path, "w:gz") as tar:
        for inner in sorted(folder.iterdir()):
            tar.add(inner, inner.name)
        for name, kind in extra:
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if kind == "link" else tarfile.REGTYPE
            member.linkname = "/etc/passwd" if kind == "link" else ""
            tar.addfile(member, io.BytesIO())
    return path


def test_an_archive_is_unpacked_once(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    archive, cache = packed(tmp_path / "pets.tar.gz", folder), tmp_path / "cache"
    words = ["train", "plain", "--data", str(archive), *SMALL, "--batch-size", "6", "--cache", str(cache)]
    assert main([*words, "--out", str(tmp_path / "a"), "--json"]) == 0
    import hashlib

    record = json.loads(capsys.readouterr().out)
    assert record["data"]["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert sum((cache / name).is_dir() for name in kept) == 1  # beside it lie the decoded images
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == kept


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("../outside.txt", "file"), "is refused"),
        (("train/link", "link"), "holds 'train/link', neither a file nor a folder"),
        (None, "is not a whole tar archive"),
    ],
)
def test_an_archive_that_is_refused_leaves_nothing(
    extra: tuple[str, str] | None, said: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    archive, cache = packed(tmp_path / "pets.tar.gz", folder, *([extra] if extra else [])), tmp_path / "cache"
    if extra is None:
        archive.write_bytes(archive.read_bytes()[:-200])
    words = ["train", "plain", "--data", str(archive), *SMALL, "--cache", str(cache), "--out", str(tmp_path / "run")]
    assert said in failing(capsys, *words)
    assert not [*cache.iterdir()] and not (tmp_path / "outside.txt").exists()


def test_another_recipe_model_or_run_is_not_resumed(trained: Path, capsys: Capture) -> None:
    words = ["train", *DIGITS, *SHORT, "--ema", "0.9", "--out", str(trained)]
    assert "holds a run; expected --resume to resume it" in failing(capsys, *words)
    (trained / "record.json").rename(trained / "record.aside")
    try:
        assert "its recipe.lr is 0.004; expected 0.1" in failing(capsys, *words, "--resume", "--lr", "0.1")
        assert "its seed is 0; expected 4" in failing(capsys, *words, "--resume", "--seed", "4")
        assert "its model.mixer is vit_relpos; expected vit" in failing(capsys, *words, "--resume", "--mixer", "vit")
    finally:
        (trained / "record.aside").rename(trained / "record.json")
    assert RunRecord.load(trained / "record.json").failure is None


def test_a_run_that_never_came_to_a_checkpoint_is_not_in_the_way(tmp_path: Path, capsys: Capture) -> None:
    words = ["train", *DIGITS, *SHORT, "--out", str(tmp_path / "run")]
    assert "invalid batch_size=5000" in failing(capsys, *words, "--batch-size", "5000", "--drop-last")
    assert main(words) == 0
    assert RunRecord.load(tmp_path / "run" / "record.json").recipe["batch_size"] == 48
    assert "holds a run" in failing(capsys, *words)


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: Capture) -> None:
    from kernelbank.files import sole_user

    with sole_user(tmp_path):
        assert "is in use by another run" in failing(capsys, "train", *DIGITS, "--out", str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    words = ["train", *DIGITS, "--epochs", "3", "--lr", "1e9", "--clip-grad", "None", "--warmup-lr", "0.001"]
    line = failing(capsys, *words, "--warmup-epochs", "1", "--out", str(out), code=1)
    assert "training loss" in line and "at epoch" in line and "step" in line and "lr" in line
    assert "there is no checkpoint" in line or f"the last good checkpoint is {out}/checkpoint.safetensors" in line
    failure = RunRecord.load(out / "record.json").failure
    assert failure is not None and failure in line


def test_a_full_disk_loses_nothing(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, room = tmp_path / "run", Path.write_bytes, [2]

    def write(path: Path, data: Any) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    line = failing(capsys, "train", *DIGITS, "--epochs", "3", "--out", str(out))
    assert line == f"kernelbank: error: {out}/checkpoint.safetensors: No space left on device"
    monkeypatch.setattr(Path, "write_bytes", real)
    assert not list(out.glob("*.tmp"))
    assert main(["train", "--resume", "--out", str(out)]) == 0  # from the second epoch's checkpoint
    epochs = [e["epoch"] for e in RunFolder(out).events() if e["event"] == "epoch"]
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("kind", ["digits", "files"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(
    number: int, code: int, kind: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "digits": ["train", *DIGITS, *SHORT, "--drop-path", "0.1", "--shift", "1"],
        "files": ["train", "plain", "--data", str(folder), *SMALL, "--epochs", "2", "--batch-size", "4",
                  "--auto-augment", "rand-m9-mstd0.5-inc1", "--drop-path", "0.3"],
    }[kind]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    real, seen = Watch.step, [0]

    def step(self: Watch, told: Any) -> None:
        seen[0] += 1
        if seen[0] == {"digits": 30, "files": 13}[kind]:  # inside the second epoch
            os.kill(os.getpid(), number)
        real(self, told)

    monkeypatch.setattr(Watch, "step", step)
    capsys.readouterr()
    line = failing(capsys, *words, "--out", str(tmp_path / "stopped"), code=code)
    assert f"resume with: kernelbank train --resume --out {tmp_path}/stopped" in line
    assert "stopped after epoch 1 and" in line
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(["train", "--resume", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "stopped")]) == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]  # bit by bit, though it stopped inside an epoch


def test_a_checkpoint_that_is_cut_falls_back_on_the_one_before(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    (out / "record.json").unlink()
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert ", set aside as checkpoint.safetensors.broken" in capsys.readouterr().err
    assert (out / "weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()


def test_weights_that_do_not_fit_are_one_line(trained: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = ["--initial-checkpoint", str(trained / "weights.safetensors")]
    line = failing(capsys, "train", "hierarchical", "--data", "digits", "--recipe", "digits", *weights)
    assert "holds a model with a vit trunk; expected a swin trunk" in line
    line = failing(capsys, "evaluate", str(trained), "--data", str(folder), "--img-size", "8", "--workers", "0")
    assert "has 10 classes, pets has 2" in line
    (tmp_path / "cut.safetensors").write_bytes((trained / "weights.safetensors").read_bytes()[:999])
    line = failing(capsys, "train", *DIGITS, "--initial-checkpoint", str(tmp_path / "cut.safetensors"))
    assert "truncated or not safetensors" in line
    stranger = tmp_path / "stranger.pt"
    torch.save({"conv.weight": torch.zeros(3)}, stranger)
    line = failing(capsys, "train", *DIGITS, "--initial-checkpoint", str(stranger))
    assert "does not fit PlainBackbone" in line and "is missing" in line


def test_a_run_json_that_is_cut(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "run.json").write_text((trained / "run.json").read_text()[:50])
    line = failing(capsys, "train", "--resume", "--out", str(tmp_path))
    assert f"{tmp_path}/run.json is damaged" in line
