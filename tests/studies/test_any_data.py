"""Studies on data, models and recipes of the user's: folders of images, stock models, shards, dry runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kernelbank.cli import main
from kernelbank.data.load import open_data
from kernelbank.errors import InputError
from kernelbank.records import RunRecord

SMALL = ["--models", "vit_kb_test_patch16_64", "swin_kb_test_patch4_window7_64", "--img-size", "32", "--recipe",
         "cifar10", "--epochs", "1", "--batch-size", "8", "--drop-path", "0", "--workers", "0", "--device", "cpu",
         "--jobs", "1", "--seeds", "0"]  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 training and 4 validation images."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:02}.png")
    return root


def records(out: Path) -> list[RunRecord]:
    return [RunRecord.load(path) for path in sorted((out / "records").iterdir())]


def test_a_folder_two_hosts_and_a_recipe(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = ["--rows", "softmax", "relu", "softmax-absolute"]
    words = ["study", "softmax", "--data", str(folder), *SMALL, *rows, "--out", str(tmp_path)]
    assert main(words) == 0
    found = {(record.model.name, record.row): record for record in records(tmp_path)}
    assert len(found) == 6 and {record.data.train for record in found.values()} == {40}
    vit, swin = (found[name, "relu"] for name in SMALL[1:3])
    assert vit.mixer == "vit_relpos activation=relu,count" and swin.mixer == "swin activation=relu,count"
    assert vit.model.img_size == (32, 32) and vit.model.num_classes == 2 and vit.recipe["batch_size"] == 8
    assert found[SMALL[1], "softmax-absolute"].mixer == "vit"
    shown = capsys.readouterr()
    assert "the warm-up takes 0 of 1 epochs, since the 3 of recipe cifar10 do not fit" in shown.err
    assert "activation=relu,count" in shown.out and "no test split" in shown.out and "diverged" not in shown.out
    before = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert main(words) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before


def test_a_stock_model_of_timm_is_a_host(folder: Path, tmp_path: Path) -> None:
    words = ["--model-args", "depth=1", "embed_dim=24", "num_heads=2", "patch_size=8", "--rows", "softmax", "relu"]
    assert main(["study", "softmax", "--data", str(folder), *SMALL[3:], "--models", "vit_tiny_patch16_224", *words,
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    found = {record.row: record for record in records(tmp_path)}
    assert found["relu"].mixer == "vit_relpos activation=relu,count" and found["softmax"].mixer == "vit_relpos"
    assert found["relu"].params == found["softmax"].params


def test_shards_lie_in_one_folder_and_the_whole_repeats_none(tmp_path: Path, capsys: Capture) -> None:
    words = ["study", "softmax", "--epochs", "1", "--rows", "softmax", "relu", "--models", "plain", "--seeds", "0", "1",
             "2", "--jobs", "1", "--out", str(tmp_path)]  # fmt: skip
    counts = []
    for shard in ("1/4", "2/4", "3/4", "4/4"):
        assert main([*words, "--shard", shard]) == 0
        counts.append(len(records(tmp_path)))
        assert "the same command without --shard writes the table" in capsys.readouterr().err
    assert counts == [2, 4, 5, 6] and not (tmp_path / "table.md").exists()
    assert main(words) == 0
    assert "6 runs, 6 finished before" in capsys.readouterr().err and (tmp_path / "table.md").exists()


def test_a_dry_run_tells_sizes_and_hours_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["study", "depthwise", "--rows", "softmax", "dwsa", "--models", "plain", "--dry-run"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    softmax, dwsa = told["rows"]
    assert softmax["params"] == 58_506 or softmax["params"] > dwsa["params"]
    assert softmax["macs"] > dwsa["macs"] > 1e5 and told["seeds"] == 3 and told["faults"] == []
    assert told["hours"] == pytest.approx(3 * (softmax["run_seconds"] + dwsa["run_seconds"]) / 3600)
    assert main([*words, "--epochs", "24"]) == 0
    assert "6 runs (2 rows, 3 seeds) of 24 epochs, batch 48" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_on_few_images_says_what_would_keep_it_from_starting(folder: Path, capsys: Capture) -> None:
    words = ["--dry-run", "--rows", "softmax", "--batch-size", "512"]
    assert main(["study", "softmax", "--data", str(folder), *SMALL, *words]) == 0
    assert "batch_size=512 with 1 repeats leaves no update of 40 training images" in capsys.readouterr().out


def test_fewer_training_images_are_the_same_share_of_every_class(folder: Path, tmp_path: Path) -> None:
    from kernelbank.data.assemble import with_fewer
    from kernelbank.data.images import FileSplit, Loading

    data = open_data(str(folder), Loading(size=(3, 16, 16), workers=0), cache=tmp_path)
    few, more = with_fewer(data, 10), with_fewer(data, 20)
    assert isinstance(few.train, FileSplit) and isinstance(more.train, FileSplit)
    assert set(few.train.rows) < set(more.train.rows) and len(few.train) == few.identity.train == 10
    labels = np.asarray(few.train.source.labels)[few.train.rows]
    assert np.bincount(labels).tolist() == [5, 5]
    with pytest.raises(InputError, match=r"invalid train_images=41 of .*; expected at most 40"):
        with_fewer(data, 41)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "resnet18"], "models: resnet18 cannot be the host of a study"),
        (["--models", "vit_linformer_test_patch16_64"], "the rows that run: --rows softmax-absolute"),
        (["--train-images", "99"], "invalid train_images=99"),
        (["--tracker", "trackio"], "tracker trackio needs trackio"),
    ],
)
def test_what_cannot_start_is_one_line(
    folder: Path, tmp_path: Path, words: list[str], said: str, capsys: Capture
) -> None:
    rows = ["--rows", "softmax", "softmax-absolute"]
    out = tmp_path / "out"
    models = SMALL if words[0] != "--models" else SMALL[3:]
    assert main(["study", "softmax", "--data", str(folder), *models, *rows, *words, "--out", str(out)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("kernelbank") and said in last and not out.exists()
