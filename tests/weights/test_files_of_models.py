"""Files with the description of their model: what is written is loaded, converted or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_models import drawn

import kernelbank
import kernelbank.models
from kernelbank import SpecError, cli
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, TimmTrunk, ViTTrunk
from kernelbank.nn.build import build
from kernelbank.nn.mixer import Mixer
from kernelbank.train.model import describe
from kernelbank.weights.file import read_model_file, save_model

Capture = pytest.CaptureFixture[str]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)


def run(capsys: Capture, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["convert", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def saved(path: Path, name: str, **options: Any) -> Any:
    """The model `name` with weights drawn at random, written to `path`."""
    spec = describe(name, num_classes=5, img_size=(64, 64), **options)
    model = drawn(build(spec))
    save_model(path, model.state_dict(), spec, "a test")
    return model


# ---- stock models of timm --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kernelbank", "timm", "mmpretrain"])
def test_a_stock_model_of_timm_becomes_any_dialect(to: str, tmp_path: Path, capsys: Capture) -> None:
    """A fine-tuned model of timm is read as timm's own checkpoint, except that nothing about it is assumed."""
    model = saved(tmp_path / "run.safetensors", "test_vit")
    code, out, err = run(capsys, tmp_path / "run.safetensors", tmp_path / "out.safetensors", "--to", to)
    assert (code, err) == (0, "") and "assumed" not in out and "read: timm, vit, 6 blocks" in out
    assert ("not proved" if to == "mmpretrain" else "\nproved: ") in out
    if to == "kernelbank":
        torch.testing.assert_close(outputs(kernelbank.load(tmp_path / "out.safetensors")), outputs(model))
    created = timm.create_model(
        "test_vit", num_classes=5, img_size=64, checkpoint_path=str(tmp_path / "run.safetensors")
    )  # fmt: skip
    assert torch.equal(outputs(created.eval()), outputs(model))


@pytest.mark.parametrize(("name", "mixer", "registered"), [
    ("test_vit", "dwsa", "vit_kb_test_patch16_64"), ("test_vit", "vit", "vit_kb_test_patch16_64"),
    ("swin_tiny_patch4_window7_224", "activation=relu,count", "swin_kb_test_patch4_window7_64"),
])  # fmt: skip
def test_a_stock_model_with_mixers_becomes_a_backbone(
    name: str, mixer: str, registered: str, tmp_path: Path, capsys: Capture
) -> None:
    """timm itself has no class for it: `convert` gives the file of a registered model, which timm loads."""
    sizes = {"embed_dim": 32, "depths": (1, 2), "num_heads": (1, 2), "window_size": 7} if "swin" in name else {}
    model = saved(tmp_path / "run.safetensors", name, mixer=mixer, arguments=sizes)
    assert torch.equal(outputs(kernelbank.load(tmp_path / "run.safetensors")), outputs(model))
    code, out, err = run(capsys, tmp_path / "run.safetensors", tmp_path / "ours.safetensors")
    assert (code, err) == (0, "") and "\nproved: " in out
    torch.testing.assert_close(outputs(kernelbank.load(tmp_path / "ours.safetensors")), outputs(model))
    _, spec = read_model_file(tmp_path / "ours.safetensors")
    assert spec is not None and not isinstance(spec.trunk, TimmTrunk)
    trunk = {"depth": 6, "embed_dim": 64, "num_heads": 2} if isinstance(spec.trunk, ViTTrunk) else \
        {"depths": (1, 2), "embed_dim": 32, "num_heads": (1, 2)}  # fmt: skip
    created = timm.create_model(
        registered, mixer=spec.mixer, mlp=spec.mlp, num_classes=5, img_size=64, **trunk,
        checkpoint_path=str(tmp_path / "ours.safetensors"),
    )  # fmt: skip
    torch.testing.assert_close(outputs(created.eval()), outputs(model))
    code, out, err = run(capsys, tmp_path / "run.safetensors", tmp_path / "timm.safetensors", "--to", "timm")
    assert (code == 0) == (mixer == "vit") and (code == 0 or "has no place in timm" in err)


def test_a_model_that_no_trunk_holds_stays_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    model = saved(tmp_path / "run.safetensors", "vit_base_patch16_rpn_224",
                  arguments={"depth": 1, "embed_dim": 32, "num_heads": 2})  # fmt: skip
    code, out, _ = run(capsys, tmp_path / "run.safetensors", tmp_path / "out.safetensors", "--json")
    assert code == 0 and json.loads(out)["family"] == "timm"
    assert torch.equal(outputs(kernelbank.load(tmp_path / "out.safetensors")), outputs(model))
    code, _, err = run(capsys, tmp_path / "run.safetensors", tmp_path / "no.safetensors", "--to", "timm")
    assert code == 2 and "timm's vit_base_patch16_rpn_224 has no place in timm; expected --to kernelbank" in err


def test_half_precision_of_a_stock_model_stays(tmp_path: Path) -> None:
    spec = describe("test_vit", num_classes=5, img_size=(64, 64))
    save_model(tmp_path / "x.safetensors", build(spec).bfloat16().state_dict(), spec)
    assert {p.dtype for p in kernelbank.load(tmp_path / "x.safetensors").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("trunk", "match"), [
    ({"name": "hf-hub:nobody/nothing"}, "unknown model 'hf-hub:nobody/nothing'"),
    ({"name": "local-dir:nowhere"}, "unknown model 'local-dir:nowhere'"),
    ({"name": "test_vitt"}, "unknown model 'test_vitt'; did you mean 'test_vit'"),
    ({"arguments": {"pretrained": True}}, "invalid arguments of test_vit: 'pretrained'"),
    ({"arguments": {"checkpoint_path": "x.npz"}}, "invalid arguments of test_vit: 'checkpoint_path'"),
    ({"arguments": {"num_classes": 3}}, "invalid arguments of test_vit: 'num_classes'"),
    ({"arguments": {"depth": "x"}}, "model test_vit cannot be built with"),
])  # fmt: skip
def test_a_description_fetches_nothing(
    trunk: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("a file that is loaded fetches another")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetch)
    monkeypatch.setattr("timm.models._builder.load_pretrained", fetch)
    path = tmp_path / "x.safetensors"
    saved(path, "test_vit")
    state, spec = read_model_file(path)
    assert spec is not None
    model = spec.to_document()
    document = {"file_version": 2, "model": {**model, "trunk": {**model["trunk"], **trunk}}, "source": ""}
    save_file(state, path, {"kernelbank": json.dumps(document)})
    with pytest.raises(InputError, match=match) as error:
        kernelbank.load(path)
    assert str(path) in str(error.value) or "model" in str(error.value)


# ---- types and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_kb_test_patch16_64", "dwnet_test", "test_vit"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_weights_that_are_no_floating_point_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, name)
    state, spec = read_model_file(path)
    assert spec is not None
    save_model(path, {key: tensor.to(dtype) for key, tensor in state.items()}, spec)
    with pytest.raises(InputError, match=rf"invalid dtype {dtype}; expected floating point"):
        kernelbank.load(path)


def test_counters_that_are_floating_point_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, "dwnet_test")
    state, spec = read_model_file(path)
    assert spec is not None and any(not tensor.is_floating_point() for tensor in state.values())
    save_model(path, {key: tensor.float() for key, tensor in state.items()}, spec)
    with pytest.raises(InputError, match=r"num_batches_tracked.*invalid dtype torch.float32; expected integers"):
        kernelbank.load(path)


ODD: tuple[Any, ...] = (None, -1, 0, 3, "x", [], {}, True, 3.5, [1, 1, 1], [16, 16], "vit | vit", ["a"], 2**70)


@pytest.mark.parametrize("name", ["vit_kb_test_patch16_64", "swin_kb_test_patch4_window7_64", "test_vit"])
def test_every_value_of_a_description_is_checked(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, name)
    state, spec = read_model_file(path)
    assert spec is not None
    document, refused = spec.to_document(), 0
    places = [(document, key) for key in document]
    places += [(document[part], key) for part in ("trunk", "dropout") for key in document[part]]
    for part, key in places:
        before = part[key]
        for odd in ODD:
            part[key] = odd
            save_file(state, path, {"kernelbank": json.dumps({"file_version": 2, "model": document})})
            try:
                kernelbank.load(path)
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
        part[key] = before
    assert refused > 0.85 * len(places) * len(ODD)


def test_a_model_that_pads_its_images_takes_any_size() -> None:
    trunk = ViTTrunk(embed_dim=32, depth=1, num_heads=1, dynamic_img_size=True, dynamic_img_pad=True)
    spec = ModelSpec(trunk=trunk, mixer="vit", mlp="ffn", img_size=(40, 50))
    assert spec.stages[0].grid == (2, 3) and build(spec)(torch.zeros(1, 3, 40, 50)).shape == (1, 1000)
    with pytest.raises(SpecError, match=r"invalid img_size=\(40, 50\)"):
        ModelSpec(trunk=ViTTrunk(), mixer="vit", mlp="ffn", img_size=(40, 50))
    with pytest.raises(SpecError, match="invalid global_pool='token' with class_token=False"):
        ViTTrunk(class_token=False)


# ---- files of KernelBank 0.1 -----------------------------------------------------------------------------


def stacked(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state as 0.1 wrote it: the kernels of an FFN stacked by head."""
    state = model.state_dict()
    for path, mixer in model.named_modules():
        if isinstance(mixer, Mixer) and path.endswith("mlp"):
            state[f"{path}.key.weight"] = state[f"{path}.key.weight"][None, :, :, None, None]
            state[f"{path}.key.bias"] = state[f"{path}.key.bias"][None]
            state[f"{path}.value.weight"] = state[f"{path}.value.weight"][None]
    return {key: tensor.contiguous() for key, tensor in state.items()}


CONVERTED = {
    "vit_kb_test_patch16_64": {
        "version": 1, "mixer": "vit", "mlp": "ffn", "source": "x", "family": "plain", "pad": "masked",
        "norm_eps": 1e-6, "arguments": {
            "img_size": [64, 64], "patch_size": [16, 16], "in_chans": 3, "num_classes": 5, "global_pool": "token",
            "embed_dim": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False,
            "proj_bias": True, "init_values": None, "class_token": True, "pos_embed": "learn",
            "no_embed_class": False, "reg_tokens": 0, "pre_norm": False, "final_norm": True, "fc_norm": False,
            "act_layer": "gelu",
        },
    },
    "swin_kb_test_patch4_window7_64": {
        "version": 1, "mixer": "vit_relpos support=window(7, alternate)", "mlp": "ffn", "source": "x",
        "family": "hierarchical", "pad": "timm", "norm_eps": 1e-5, "arguments": {
            "img_size": [64, 64], "patch_size": [4, 4], "in_chans": 3, "num_classes": 5, "global_pool": "avg",
            "embed_dim": 16, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 4, 8], "window_size": [7, 7, 7, 7],
            "mlp_ratio": 4.0, "qkv_bias": True,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_files_that_convert_wrote_before(name: str, tmp_path: Path, capsys: Capture) -> None:
    model = saved(tmp_path / "new.safetensors", name)
    save_file(stacked(model), tmp_path / "old.safetensors", {"kernelbank": json.dumps(CONVERTED[name])})
    assert torch.equal(outputs(kernelbank.load(tmp_path / "old.safetensors")), outputs(model))
    code, out, _ = run(capsys, tmp_path / "old.safetensors", tmp_path / "new_again.safetensors")
    assert code == 0 and "assumed" not in out
    again = load_file(tmp_path / "new_again.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "mixer", "arguments"), [
    ("vit_kb_test_patch16_64", "dwsa", {"drop_path_rate": 0.1}), ("swin_kb_test_patch4_window7_64", "swin", {}),
    ("test_vit", None, {"init_values": 0.1}), ("test_vit", "dwsa", {}),
])  # fmt: skip
def test_files_that_train_wrote_before(
    name: str, mixer: str | None, arguments: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    model = saved(tmp_path / "new.safetensors", name, mixer=mixer, arguments=arguments)
    entry = {"name": name, "mixer": mixer, "mlp": None if name == "test_vit" else "ffn", "arguments": arguments,
             "num_classes": 5, "in_chans": 3, "img_size": 64}  # fmt: skip
    save_file(stacked(model), tmp_path / "old.safetensors", {"model": json.dumps(entry)})
    assert torch.equal(outputs(kernelbank.load(tmp_path / "old.safetensors")), outputs(model))
    _, old = read_model_file(tmp_path / "old.safetensors")
    _, new = read_model_file(tmp_path / "new.safetensors")
    assert old == new
    assert run(capsys, tmp_path / "old.safetensors", tmp_path / "ours.safetensors")[0] == 0


@pytest.mark.parametrize("entry", ["resnet", "{}", "[" * 100000, "3", json.dumps({"name": "x"})])
def test_an_entry_of_others_is_no_description(entry: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "x.safetensors", "vit_kb_test_patch16_64")
    save_file(model.state_dict(), tmp_path / "x.safetensors", {"model": entry})
    assert read_model_file(tmp_path / "x.safetensors")[1] is None


def test_damaged_entries_of_before_are_one_line(tmp_path: Path) -> None:
    model = saved(tmp_path / "x.safetensors", "vit_kb_test_patch16_64")
    good = CONVERTED["vit_kb_test_patch16_64"]
    entry = {"name": "plain", "mixer": None, "mlp": None, "arguments": {}, "num_classes": 5, "in_chans": 3,
             "img_size": None}  # fmt: skip
    for metadata in (
        {"kernelbank": json.dumps({**good, "arguments": 3})}, {"kernelbank": json.dumps({**good, "family": [1]})},
        {"kernelbank": json.dumps({"version": 1})}, {"kernelbank": json.dumps({**good, "norm_eps": "x"})},
        {"model": json.dumps({**entry, "name": 3})}, {"model": json.dumps({**entry, "arguments": {"wings": 2}})},
        {"model": json.dumps({**entry, "img_size": "x"})}, {"model": json.dumps({**entry, "mixer": "vitt"})},
    ):  # fmt: skip
        save_file(model.state_dict(), tmp_path / "x.safetensors", metadata)
        with pytest.raises(InputError, match=r"x\.safetensors: the description of the model in its metadata is damag"):
            kernelbank.load(tmp_path / "x.safetensors")
