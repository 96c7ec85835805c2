"""``kernelbank explain`` from the command line: models of every kind, what is written, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pages import texts
from PIL import Image

from kernelbank import cli
from kernelbank.explanation import session, subject

Capture = pytest.CaptureFixture[str]
OURS, STOCK = "vit_kb_test_patch16_64", "test_vit"


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.RandomState(0).randint(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def run(capsys: Capture, *words: object) -> tuple[int, str, str]:
    code = cli.main(["explain", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def shown(page: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(texts(page.read_text())["data"])
    return found


def test_a_page_a_table_and_figures(capsys: Capture, photo: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.html"
    words = [OURS, photo, "--out", out, "--png", tmp_path / "maps.png", "--curves", tmp_path / "curves.svg"]
    code, printed, err = run(capsys, *words)
    assert code == 0 and err == "photo.png: 80 x 60 pixels enlarged to 64 x 64: the centre\n"
    lines = printed.splitlines()
    assert lines[0].startswith(f"{OURS} (random weights (seed 0)) on photo.png; ")
    assert [line.split()[0] for line in lines[2:5]] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert [line.split(",")[0] for line in lines[-3:]] == [f"wrote {path}" for path in words[3::2]]
    first = out.read_bytes()
    with Image.open(tmp_path / "maps.png") as image:
        assert image.width > image.height
    assert "</svg>" in (tmp_path / "curves.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.svg", "maps.png", "new", "photo.png"]
    assert run(capsys, *words)[0] == 0 and out.read_bytes() == first  # the same weights, the same bytes


def test_json_holds_every_head_of_both_models(capsys: Capture, photo: str, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    words = ["--against", OURS, "--against-mixer", "dwsa", "--layers", "0", "blocks.2.attn", "--json", "--out", page]
    code, printed, _ = run(capsys, OURS, photo, photo, *words)
    document = json.loads(printed)
    assert code == 0 and document["files"] == [str(page)]
    first, second = document["models"]
    assert first["model"] == OURS and second["model"] == f"{OURS} with dwsa"
    assert len(first["pictures"]) == 2
    heads = first["pictures"][0]["statistics"]
    assert {head["layer"] for head in heads} == {"blocks.0.attn", "blocks.2.attn"}
    assert all(head["static_share"] == 0 and head["dynamic_share"] == 1 for head in heads)
    assert all(head["static_share"] > 0 for head in second["pictures"][0]["statistics"])
    data = shown(page)
    assert [model["label"] for model in data["models"]] == [OURS, f"{OURS} with dwsa"]  # type: ignore[attr-defined]


def test_stock_models_with_and_without_other_mixers(capsys: Capture, photo: str, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    code, printed, _ = run(capsys, STOCK, photo, "--mixer", "activation=relu,count", "--against", STOCK, "--out", page)
    assert code == 0 and f"{STOCK} with activation=relu,count" in printed
    relu, softmax = (model["layers"][0]["spec"] for model in shown(page)["models"])  # type: ignore[attr-defined]
    assert (relu, softmax) == ("relu_attention", "vit")


def test_the_folder_of_a_run_and_a_picture_of_one_channel(capsys: Capture, tmp_path: Path, photo: str) -> None:
    folder = tmp_path / "run"
    train = ["train", "plain", "--data", "digits", "--recipe", "digits", "--device", "cpu", "--epochs", "1",
             "--warmup-epochs", "0"]  # fmt: skip
    assert cli.main([*train, "--mixer", "vit_relpos", "--out", str(folder)]) == 0
    capsys.readouterr()
    code, printed, err = run(capsys, folder, photo, "--out", tmp_path / "a.html")
    assert code == 0 and printed.startswith(f"{folder}: vit_relpos (weights after epoch 1) on photo.png; class ")
    assert "photo.png: in colour: the model takes grey" in err
    code, printed, _ = run(capsys, folder, photo, "--mixer", "activation=relu,count", "--out", tmp_path / "a.html")
    assert code == 0 and "with activation=relu,count" in printed
    (folder / "run.json").write_text("{")
    code, printed, err = run(capsys, folder, photo, "--out", tmp_path / "b.html")
    assert (code, printed, err.count("\n")) == (2, "", 1) and not (tmp_path / "b.html").exists()


def test_digits_are_normalised_as_they_were_for_training() -> None:
    split = subject.digits().train
    model = subject.open_model("plain", pretrained=False, mixer=None, img_size=None)
    assert (model.channels, model.size, model.white) == (1, (8, 8), 16)
    whole = split.images * model.std[0] + model.mean[0]
    torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
    assert float(whole.min().round()) == 0 and float(whole.max().round()) == 16


def test_a_model_has_the_classes_that_its_weights_have(photo: str) -> None:
    for name, count, first in (("vit_tiny_patch16_224.augreg_in21k", 21843, "organism, being"), (OURS, 1000, "tench"),
                               ("vit_small_patch14_dinov2", 0, None)):  # fmt: skip
        opened = subject.open_model(name, pretrained=False, mixer=None, img_size=(56, 56) if "14" in name else None)
        assert len(opened.classes) == opened.model.num_classes == count
        assert first is None or opened.classes[0].startswith(first)
        shown = session.explained(opened, [session.read_picture(Path(photo), opened.size, 3)], (0,)).shown[0]
        assert len(shown.classes) == min(count, 5)


def test_a_converted_file(capsys: Capture, photo: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    assert cli.main(["convert", STOCK, str(file), "--untrained"]) == 0
    capsys.readouterr()
    code, printed, _ = run(capsys, file, photo, "--out", tmp_path / "a.html")
    assert code == 0 and f"{file} (weights of weights.safetensors) on photo.png" in printed
    code, printed, err = run(capsys, file, photo, "--pretrained", "--out", tmp_path / "b.html")
    assert (code, printed) == (2, "") and "expected the name of a model" in err


def test_names_of_tokens() -> None:
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
    make = timm.models.VisionTransformer
    assert subject.prefix_names(make(**tiny)) == ("class",)
    assert subject.prefix_names(make(**tiny, class_token=False, global_pool="avg")) == ()
    registers = subject.prefix_names(make(**tiny, class_token=False, global_pool="avg", reg_tokens=2))
    assert registers == ("register 1", "register 2")
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    assert subject.prefix_names(distilled) == ("class", "distillation")
    assert subject.prefix_names(timm.create_model("swin_kb_test_patch4_window7_64")) == ()


def test_names_of_classes(capsys: Capture, photo: str, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {index}" for index in range(1000)))
    code, printed, _ = run(capsys, OURS, photo, "--classes", names, "--out", tmp_path / "a.html")
    assert code == 0 and re.search(r"photo.png; kind \d+, \d", printed)
    for index in range(3):
        (tmp_path / "data" / f"class{index}").mkdir(parents=True)
    code, _, err = run(capsys, OURS, photo, "--classes", tmp_path / "data", "--out", tmp_path / "a.html")
    assert code == 2 and "3 names; expected 1000" in err


def test_names_of_files_are_printable(capsys: Capture, photo: str, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[31m<b>.png"
    Path(photo).rename(odd)
    code, printed, err = run(capsys, OURS, odd, "--out", tmp_path / "a.html")
    assert code == 0 and "\x1b" not in printed + err and r"a\x1b[31m<b>.png" in printed
    assert "1m<b>" not in (tmp_path / "a.html").read_text()


BAD = {
    "no picture": ([OURS], "a picture is missing"),
    "no such model": (["vit_kb_tset", "PHOTO"], "unknown model 'vit_kb_tset'; did you mean"),
    "no such second model": ([OURS, "PHOTO", "--against", "resnet0"], "unknown model 'resnet0'"),
    "no mixers": (["test_resnet", "PHOTO"], "invalid model without mixers: ResNet"),
    "a folder that is no run": (["FOLDER", "PHOTO"], "the folder has no run.json"),
    "a file that is no model": (["TEXT", "PHOTO"], "unknown kind of file '.txt'"),
    "no such picture": ([OURS, "none.png"], "invalid image none.png: no such file"),
    "no image": ([OURS, "TEXT"], "expected a picture such as"),
    "the second is no image": ([OURS, "PHOTO", "TEXT"], "expected a picture such as"),
    "no such layer": ([OURS, "PHOTO", "--layers", "blocks.0.atn"], "did you mean 'blocks.0.attn'"),
    "no layer of this number": ([OURS, "PHOTO", "--layers", "3"], "unknown layer 3; expected 0 to 2"),
    "below a file": ([OURS, "PHOTO", "--out", "TEXT/a.html"], "it cannot be written to"),
    "no page": ([OURS, "PHOTO", "--out", "a.png"], "expected a name in .html"),
    "an input as an output": ([OURS, "PHOTO", "--png", "PHOTO"], "it is an input or another output"),
    "two outputs of one name": ([OURS, "PHOTO", "--png", "a.png", "--curves", "./a.png"], "or another output"),
    "no figure": ([OURS, "PHOTO", "--png", "a.gif"], "expected a name in .png, .svg, .pdf"),
    "a size of the patch": ([OURS, "PHOTO", "--img-size", "60", "64"], "expected sides divisible by the patch size"),
    "no size": ([OURS, "PHOTO", "--img-size", "0", "64"], "expected whole numbers >= 1"),
    "no share": ([OURS, "PHOTO", "--position", "0.5", "2"], "expected two shares from 0 to 1"),
    "half of a pair": ([OURS, "PHOTO", "--against-mixer", "dwsa"], "invalid --against-mixer without --against"),
    "a spec that does not fit": ([OURS, "PHOTO", "--mixer", "kernel=full"], "invalid kernel=full"),
    "no names": ([OURS, "PHOTO", "--classes", "none.txt"], "invalid classes=none.txt: no such file"),
    "an unknown option": ([OURS, "PHOTO", "--lyaers", "3"], "did you mean '--layers'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: str, case: str
) -> None:
    words, message = BAD[case]
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "folder").mkdir()
    names = {"PHOTO": photo, "TEXT": str(tmp_path / "text.txt"), "FOLDER": str(tmp_path / "folder")}
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = [word.replace(key, value) for word in words for key, value in [_name(word, names)]]
    code, printed, err = run(capsys, *given)
    assert (code, printed) == (2, "") and message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def _name(word: str, names: dict[str, str]) -> tuple[str, str]:
    """The placeholder in a word and the path in its place."""
    return next(((key, value) for key, value in names.items() if key in word), (word, word))


def test_too_many_weights_are_refused_before_anything_is_written(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: str
) -> None:
    monkeypatch.setattr(session, "MOST_WEIGHTS", 1_000)
    code, printed, err = run(capsys, OURS, photo, "--out", tmp_path / "a.html")
    assert (
        (code, printed) == (2, "") and err.startswith("kernelbank: error: too many weights: ") and err.count("\n") == 1
    )
    assert not (tmp_path / "a.html").exists()
    monkeypatch.setattr(session, "MOST_WEIGHTS", 10_000)
    assert run(capsys, OURS, photo, "--out", tmp_path / "a.html")[0] == 0


def test_weights_that_are_not_finite(capsys: Capture, tmp_path: Path, photo: str) -> None:
    file = tmp_path / "weights.safetensors"
    assert cli.main(["convert", STOCK, str(file), "--untrained"]) == 0
    capsys.readouterr()
    loaded = subject.open_model(str(file), pretrained=False, mixer=None, img_size=None)
    with torch.no_grad():
        loaded.model.head.bias.fill_(torch.nan)
    with pytest.raises(session.InputError, match="its outputs are not finite; expected trained weights"):
        session.explained(loaded, [session.read_picture(Path(photo), loaded.size, 3)], None)


def test_without_the_extras_it_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch, photo: str) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, printed, err = run(capsys, OURS, photo)
    assert (code, printed, err.count("\n")) == (2, "", 1) and "pip install 'kernelbank[train,report]'" in err
