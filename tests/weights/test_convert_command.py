"""kernelbank convert: transcripts, files that load again, and one line for everything that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tiny_models import PLAIN, STAGES, drawn

import kernelbank
import kernelbank.models
from kernelbank import cli
from kernelbank.errors import InputError
from kernelbank.nn.build import build
from kernelbank.train.model import describe
from kernelbank.weights import proof
from kernelbank.weights.convert import convert_state
from kernelbank.weights.dialects import NAMES
from kernelbank.weights.file import save_model
from kernelbank.weights.load import load

Capture = pytest.CaptureFixture[str]
Models = dict[str, Any]


def run(capsys: Capture, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["convert", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def files(tmp_path: Path, models: Models) -> Path:
    """A folder with one file of each family, under timm's names."""
    save_file(models["vit"].state_dict(), tmp_path / "plain.safetensors")
    torch.save({"model": models["swin"].state_dict()}, tmp_path / "stages.pth")
    return tmp_path


def outputs(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def test_a_file_of_timm_becomes_ours_and_loads(files: Path, capsys: Capture, models: Models) -> None:
    code, out, err = run(capsys, files / "plain.safetensors", files / "ours.safetensors")
    assert (code, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["read"].startswith(
        "timm, vit, 2 blocks from 64 channels, heads 1, patches of 8 x 8, images of 32 x 32"
    )
    assert lines["assumed"] == (
        "norm eps 1e-06, GELU, norms before the branches, attention scale d^-1/2, 1 heads of 64 channels, square images"
    )
    assert lines["keys"] == "32 tensors of timm -> 40 of kernelbank, none left over"
    assert lines["back"] == "32 tensors bit-equal"
    assert lines["compared"].startswith(
        "keys and shapes proved; outputs equal if the assumptions hold (max |difference|"
    )
    assert "on 2 random images through timm and" in lines["compared"]
    assert lines["specs"] == "vit; mlp ffn"
    backbone = kernelbank.load(files / "ours.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert not backbone.training
    torch.testing.assert_close(outputs(backbone, images), outputs(models["vit"], images), rtol=1e-5, atol=1e-6)
    again = timm.create_model(
        "vit_kb_small_patch16_224", checkpoint_path=str(files / "ours.safetensors"), **PLAIN
    )  # fmt: skip
    assert torch.equal(outputs(again.eval(), images), outputs(backbone, images))
    assert sorted(p.name for p in files.iterdir()) == ["ours.safetensors", "plain.safetensors", "stages.pth"]


@pytest.mark.parametrize("to", ["timm", "microsoft", "torchvision", "huggingface", "huggingface4", "mmpretrain"])
def test_every_dialect_and_back_through_files(to: str, files: Path, capsys: Capture, models: Models) -> None:
    """timm's file to a dialect, that to ours, ours to timm: the tensors are those that we began with."""
    steps = [("stages.pth", "there.safetensors", to), ("there.safetensors", "ours.safetensors", "kernelbank"),
             ("ours.safetensors", "back.safetensors", "timm")]  # fmt: skip
    for source, target, dialect in steps:
        code, out, err = run(capsys, files / source, files / target, "--to", dialect)
        assert (code, err) == (0, "") and "bit-equal" in out and "proved" in out
    back, state = load_file(files / "back.safetensors"), models["swin"].state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert load_file(files / "there.safetensors").keys() == convert_state(state, to).keys()


def test_cells_are_changed_and_tensors_told(files: Path, capsys: Capture) -> None:
    code, out, err = run(
        capsys, files / "stages.pth", files / "ours.safetensors", "--mixer", "kernel=depthwise mix=mean activation=none"
    )
    assert (code, err) == (0, "")
    assert "layers.0.blocks.1.attn.value.weight" in out and "dropped" in out and "times 0.25" in out
    backbone = load(files / "ours.safetensors")
    assert str(backbone.layers[0].blocks[0].attn.spec.kernel) == "depthwise"
    code, out, _ = run(capsys, files / "ours.safetensors", files / "again.safetensors", "--mixer", "dwsa")
    assert code == 0 and "specs: dwsa; mlp ffn" in out
    code, _, err = run(capsys, files / "ours.safetensors", files / "no.safetensors", "--to", "timm")
    assert (
        code == 2
        and "has no place in timm; expected --to kernelbank" in err
        and not (files / "no.safetensors").exists()
    )


def test_half_precision_stays_and_is_proved(files: Path, capsys: Capture, models: Models) -> None:
    save_file(models["vit"].bfloat16().state_dict(), files / "half.safetensors")
    for source, target, to in [
        ("half", "ours", "kernelbank"),
        ("ours", "again", "kernelbank"),
        ("again", "back", "timm"),
    ]:
        code, out, _ = run(capsys, files / f"{source}.safetensors", files / f"{target}.safetensors", "--to", to)
        assert code == 0 and ("\ncompared: " if source == "half" else "\nproved: ") in out
    back, state = load_file(files / "back.safetensors"), models["vit"].state_dict()
    assert all(back[key].dtype == torch.bfloat16 and torch.equal(back[key], state[key]) for key in state)


def test_windows_of_another_side_are_loaded_as_they_were_saved(files: Path, capsys: Capture) -> None:
    text = "support=window(3, alternate)"
    assert run(capsys, files / "stages.pth", files / "ours.safetensors", "--mixer", text)[0] == 0
    model = kernelbank.from_timm(drawn(SwinTransformer(**STAGES)), text)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(load(files / "ours.safetensors"), images), outputs(model, images))


def test_a_model_of_timm_by_its_name(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, Any] = {}

    def create(name: str, **kwargs: Any) -> Any:
        built.update(name=name, **kwargs)
        return drawn(VisionTransformer(**PLAIN, qk_norm=True))

    monkeypatch.setattr(timm, "create_model", create)
    code, out, _ = run(capsys, "vit_tiny_patch16_224", tmp_path / "x.safetensors", "--json")
    document = json.loads(out)
    assert code == 0 and built == {"name": "vit_tiny_patch16_224", "pretrained": True}
    assert document["tensors"] == {"source": 40, "derived": 0, "target": 48} and document["assumed"] == []
    assert document["proof"]["difference"] <= 1e-5 * document["proof"]["scale"] and document["back"] == "bit-equal"
    code, out, _ = run(capsys, "vit_tiny_patch16_224", tmp_path / "y.safetensors", "--mixer", "dwsa", "--json")
    verdicts = {line["tensor"]: line["verdict"] for line in json.loads(out)["tensors_replaced"]}
    assert verdicts["blocks.1.attn.q.weight"] == "kept" and verdicts["blocks.1.attn.q_norm.weight"] == "dropped"
    assert verdicts["blocks.1.attn.table.weight"] == "initialised" and load(tmp_path / "y.safetensors")


def test_a_name_says_what_shapes_do_not(tmp_path: Path, capsys: Capture) -> None:
    """Three heads of 16 channels cannot be read off the shapes: 48 channels would have been one head."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=4)
    torch.save(drawn(model).state_dict(), tmp_path / "x.pth")
    code, _, err = run(capsys, tmp_path / "x.pth", tmp_path / "y.safetensors", "--model", "vit_tiny_patch16_224")
    assert code == 2 and "missing blocks.1.norm1.weight" in err
    torch.save(drawn(timm.create_model("test_vit", num_classes=4)).state_dict(), tmp_path / "x.pth")
    code, out, _ = run(capsys, tmp_path / "x.pth", tmp_path / "y.safetensors", "--model", "test_vit")
    assert code == 0 and "heads 2" in out and "assumed" not in out
    code, out, _ = run(capsys, tmp_path / "x.pth", tmp_path / "y.safetensors")
    assert code == 0 and "heads 2" in out
    assert "assumed: timm's test_vit, its only architecture with these keys and shapes" in out


def test_images_that_shapes_do_not_tell(tmp_path: Path, capsys: Capture) -> None:
    torch.save(drawn(VisionTransformer(**PLAIN | {"img_size": (16, 24)})).state_dict(), tmp_path / "x.pth")
    code, _, err = run(capsys, tmp_path / "x.pth", tmp_path / "y.safetensors")
    assert code == 2 and "--img-size" in err
    code, out, _ = run(capsys, tmp_path / "x.pth", tmp_path / "y.safetensors", "--img-size", 16, 24)
    assert code == 0 and "images of 16 x 24" in out


def test_the_help_names_every_dialect(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES)


def test_without_the_library_it_says_so(files: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelbank.weights.dialects.dialect.find_spec", lambda name: None)
    code, out, _ = run(capsys, files / "stages.pth", files / "x.safetensors", "--to", "torchvision")
    assert code == 0 and "not proved: install torchvision (no module torchvision)" in out
    code, out, _ = run(capsys, files / "x.safetensors", files / "y.safetensors", "--json")
    assert code == 0 and json.loads(out)["proof"] == {"not_proved": "install torchvision (no module torchvision)"}
    code, out, err = run(
        capsys, files / "stages.pth", files / "z.safetensors", "--to", "torchvision", "--require-proof"
    )
    assert (code, out) == (2, "") and "not proved: install torchvision" in err
    assert not (files / "z.safetensors").exists()


def test_a_difference_is_an_error_and_leaves_no_file(
    files: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    code, out, err = run(capsys, files / "stages.pth", files / "x.safetensors")
    assert (code, out) == (2, "") and "not equal: max |difference|" in err and not (files / "x.safetensors").exists()


def test_bad_input_is_one_line_and_no_file(files: Path, capsys: Capture, models: Models) -> None:
    state = models["vit"].state_dict()
    variants = {
        "extra": {**state, "lora.weight": torch.ones(2)},
        "missing": {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.bias"},
        "shape": {**state, "blocks.1.mlp.fc2.weight": torch.ones(64, 9)},
        "strange": {"conv1.weight": torch.ones(2)},
        "third": {
            k: v for k, v in convert_state(state, "huggingface").items() if k != "vit.layers.0.attention.k_proj.bias"
        },
    }
    for name, tensors in variants.items():
        save_file(tensors, files / f"{name}.safetensors")
    whole = (files / "plain.safetensors").read_bytes()
    (files / "cut.safetensors").write_bytes(whole[:5000])
    kept = sorted(files.iterdir())
    target, source = files / "out.safetensors", files / "plain.safetensors"
    for argv, match in [
        (["vit_tinny_patch16_224", target], "unknown model 'vit_tinny_patch16_224'; did you mean"),
        (["resnet18", target, "--untrained"], "invalid model: a ResNet; expected timm's VisionTransformer"),
        (["vit_tiny_r_s16_p8_224", target], "has no pretrained weights; --untrained")
        if not timm.is_model_pretrained("vit_tiny_r_s16_p8_224") else (["vit_x", target], "unknown model 'vit_x'"),
        ([files / "none.pth", target], "none.pth: no such file"),
        ([files / "cut.safetensors", target], "cut.safetensors: truncated or not safetensors"),
        ([files / "extra.safetensors", target], "timm: no place for lora.weight"),
        ([files / "missing.safetensors", target], "missing blocks.1.mlp.fc2.bias"),
        ([files / "shape.safetensors", target], "wrong shape: blocks.1.mlp.fc2.weight (64, 9) instead of (64, 256)"),
        ([files / "strange.safetensors", target], "unknown dialect with the keys conv1.weight; expected"),
        ([files / "third.safetensors", target], "without vit.layers.0.attention.k_proj.bias; expected"),
        ([source, target, "--to", "swim"], "unknown dialect 'swim'"),
        ([source, target, "--to", "microsoft"], "microsoft has no vit models"),
        ([source, target, "--mixer", "vitt"], "'vitt'"),
        ([source, target, "--mixer", "swin | swin"], "expected 1 spec for 1 stages"),
        ([source, target, "--mixer", "vit kernel=two_step(7)"], "expected a multiple of 7, the number of heads"),
        ([source, target, "--to", "timm", "--mixer", "dwsa"], "invalid --mixer='dwsa' with --to timm; expected"),
        ([source, target, "--img-size", 30, 32], "invalid img_size=(30, 32); expected sides divisible by the patch"),
        ([source, target, "--model", "swin_tiny_patch4_window7_224"], "those of a vit model (timm); expected those"),
        ([source, target, "--untrained"], "invalid --untrained with a file as SRC"),
        (["deit_tiny_patch16_224", target, "--model", "x", "--to", "timm"], "invalid --model=x; expected a file"),
        ([source, files / "out.pth"], "unknown kind of file '.pth'; expected .safetensors"),
        ([source, files / "no" / "out.safetensors"], "no such folder"),
    ]:  # fmt: skip
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and err.count("\n") == 1 and match in err, (argv, err)
        assert sorted(files.iterdir()) == kept


def test_files_that_are_not_ours_or_damaged_do_not_load(files: Path, capsys: Capture) -> None:
    with pytest.raises(InputError, match="no kernelbank entry in its metadata"):
        load(files / "plain.safetensors")
    run(capsys, files / "plain.safetensors", files / "ours.safetensors")
    state = load_file(files / "ours.safetensors")
    with safe_open(files / "ours.safetensors", framework="pt") as file:
        entry = json.loads(file.metadata()["kernelbank"])
    good, trunk = entry["model"], entry["model"]["trunk"]
    for change, match in [
        ({}, ""), ({"model_version": 1}, "invalid model_version=1; expected 3"),
        ({"family": "round"}, "invalid family='round'; expected one of vit, swin, timm"),
        ({"mixer": 3}, "invalid model.mixer=3; expected str"), ({"wings": 2}, "unknown field 'wings'"),
        ({"trunk": {**trunk, "norm_eps": "x"}}, "invalid trunk.norm_eps='x'; expected float"),
        ({"trunk": {**trunk, "wings": 2}}, "trunk has an unknown field 'wings'"),
        ({"mixer": "dwsa"}, r"no place for blocks\.0\.attn\.value"), ({"mixer": "dwsb"}, "unknown row 'dwsb'"),
    ]:  # fmt: skip
        document = json.dumps({**entry, "model": {**good, **change}})
        save_file(state, files / "x.safetensors", {"kernelbank": document})
        if match:
            with pytest.raises(ValueError, match=match):
                load(files / "x.safetensors")
        else:
            load(files / "x.safetensors")
    for damaged in ("{", "[" * 100000, "3", json.dumps({**entry, "file_version": 9})):
        save_file(state, files / "x.safetensors", {"kernelbank": damaged})
        with pytest.raises(InputError, match=r"is damaged|invalid file_version=9"):
            load(files / "x.safetensors")


@pytest.mark.parametrize(("mixer", "trunk"), [
    ("vit activation=relu,count", "vit"), ("dwsa", "vit"), ("swin activation=relu,count", "swin"),
    ("activation=relu,count", "timm"),
])  # fmt: skip
def test_what_training_writes_is_loaded_and_converted(mixer: str, trunk: str, tmp_path: Path, capsys: Capture) -> None:
    """A file of `save_model` enters load, convert and timm, with mixers that no other library holds."""
    name = {"vit": "vit_kb_test_patch16_64", "swin": "swin_kb_test_patch4_window7_64", "timm": "test_vit"}[trunk]
    spec = describe(name, mixer=mixer, num_classes=5, img_size=(64, 64))
    model = drawn(build(spec))
    save_model(tmp_path / "run.safetensors", model.state_dict(), spec, "a run")
    images = torch.randn(2, 3, 64, 64)
    again = load(tmp_path / "run.safetensors")
    assert torch.equal(outputs(again, images), outputs(model, images))
    code, out, _ = run(capsys, tmp_path / "run.safetensors", tmp_path / "ours.safetensors")
    assert code == 0 and "\nproved: " in out
    assert torch.equal(outputs(load(tmp_path / "ours.safetensors"), images), outputs(model, images))
    code, _, err = run(capsys, tmp_path / "run.safetensors", tmp_path / "no.safetensors", "--to", "timm")
    assert code == 2 and "expected --to kernelbank" in err and not (tmp_path / "no.safetensors").exists()
    if trunk != "timm":
        created = timm.create_model(
            name, mixer=mixer, num_classes=5, checkpoint_path=str(tmp_path / "run.safetensors")
        )  # fmt: skip
        assert torch.equal(outputs(created.eval(), images), outputs(model, images))


def test_a_trained_softmax_model_becomes_any_dialect(tmp_path: Path, capsys: Capture) -> None:
    spec = describe("vit_kb_test_patch16_64", num_classes=5)
    model = drawn(build(spec))
    save_model(tmp_path / "run.safetensors", model.state_dict(), spec)
    for to in ("timm", "huggingface", "mmpretrain"):
        code, out, _ = run(capsys, tmp_path / "run.safetensors", tmp_path / f"{to}.safetensors", "--to", to)
        assert code == 0 and "none left over" in out, out
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=5
    )  # fmt: skip
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(outputs(theirs.eval(), images), outputs(model.eval(), images), rtol=1e-5, atol=1e-6)


def test_a_guess_is_not_a_proof(tmp_path: Path, capsys: Capture) -> None:
    """Norms after the branches have the keys and shapes of norms before them: the outputs differ, and both models are
    built from the same guess."""
    arguments = {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 64}
    model = drawn(timm.create_model("vit_base_patch16_rpn_224", **arguments))
    save_file(model.state_dict(), tmp_path / "guess.safetensors")
    code, out, _ = run(capsys, tmp_path / "guess.safetensors", tmp_path / "ours.safetensors")
    assert code == 0 and not any(line.startswith("proved") for line in out.splitlines())
    assert "norms before the branches" in out and "outputs equal if the assumptions hold" in out
    code, out, _ = run(capsys, tmp_path / "guess.safetensors", tmp_path / "ours.safetensors", "--json")
    assert json.loads(out)["proved"] is False
    code, _, err = run(
        capsys, tmp_path / "guess.safetensors", tmp_path / "no.safetensors", "--require-proof"
    )  # fmt: skip
    assert code == 2 and "not proved: assumed: " in err and not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(("change", "match"), [
    (lambda t: t.long(), "invalid dtype torch.int64; expected floating point"),
    (lambda t: t.bool(), "invalid dtype torch.bool; expected floating point"),
    (lambda t: t.to(torch.complex64), "complex numbers; expected real ones"),
    (lambda t: t[..., :0], "no numbers; expected at least one"),
])  # fmt: skip
def test_tensors_of_other_types_are_one_line(change: Any, match: str, files: Path, capsys: Capture) -> None:
    state = {key: change(tensor).contiguous() for key, tensor in load_file(files / "plain.safetensors").items()}
    save_file(state, files / "odd.safetensors")
    code, out, err = run(capsys, files / "odd.safetensors", files / "out.safetensors")
    assert (code, out) == (2, "") and match in err and err.count("\n") == 1 and not (files / "out.safetensors").exists()


@pytest.mark.slow
def test_deit_b_takes_less_than_ten_seconds(tmp_path: Path, capsys: Capture) -> None:
    """With the check. Processor time, so that other work on the machine does not count; without the imports."""
    from time import process_time

    save_file(timm.create_model("deit_base_patch16_224").state_dict(), tmp_path / "b.safetensors")
    start = process_time()
    code, out, _ = run(capsys, tmp_path / "b.safetensors", tmp_path / "x.safetensors")
    taken = process_time() - start
    assert code == 0 and "proved" in out and taken < 10
