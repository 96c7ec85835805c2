"""Exported files give the outputs of their models, and what would not is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import kernelbank
from kernelbank.atlas import ROWS
from kernelbank.errors import InputError
from kernelbank.exports import export as exporting
from kernelbank.exports.formats import FORMATS
from kernelbank.exports.preprocessing import Preprocessing, read_entry
from kernelbank.exports.runtimes import BATCH, INPUT, OUTPUT, open_file
from kernelbank.exports.runtimes import RUNTIMES as ONNX_RUNTIMES
from kernelbank.testing.small_models import TRUNKS, small_model

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FAST_CASES = [("plain", "relu_attention", ".pt2"), ("plain", "vit", ".onnx"), ("hierarchical", "swin", ".onnx")]
OTHER_CASES = [
    (trunk, row, suffix) for suffix in (".onnx", ".pt2") for trunk in TRUNKS for row in ROWS
    if (trunk, row, suffix) not in FAST_CASES
]  # fmt: skip


def model(trunk: str = "plain", row: str = "vit") -> nn.Module:
    return small_model(trunk, row)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def run_pt2(path: Path, images: Tensor) -> Tensor:
    outputs: Tensor = torch.export.load(path).module()(images)
    return outputs


RUNTIMES = {".onnx": run_onnx, ".pt2": run_pt2}


def check(trunk: str, row: str, suffix: str, folder: Path) -> None:
    """The file's outputs, run here by hand, are the model's for batches that the exporter saw neither."""
    built = model(trunk, row)
    report = kernelbank.export(built, folder / f"model{suffix}")
    assert report.difference <= 1e-4 * report.largest and report.bytes == report.path.stat().st_size
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = built(images)
            outputs = RUNTIMES[suffix](report.path, images)
        assert torch.allclose(outputs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert list(folder.iterdir()) == [report.path]


@pytest.mark.parametrize(("trunk", "row", "suffix"), FAST_CASES)
def test_a_file_gives_the_outputs_of_its_model(trunk: str, row: str, suffix: str, tmp_path: Path) -> None:
    check(trunk, row, suffix, tmp_path)


@pytest.mark.parametrize(("trunk", "row"), [("plain", "dwsa"), ("hierarchical", "swin")])
def test_openvino_runs_onnx_files(trunk: str, row: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    built, path = model(trunk, row), tmp_path / "a.onnx"
    kernelbank.export(built, path)
    run = open_file(ONNX_RUNTIMES["OpenVINO"], path)
    for batch in (1, 4):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = built(images)
        assert torch.allclose(run(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ONNX_RUNTIMES)
def test_files_that_a_runtime_cannot_load(name: str, tmp_path: Path) -> None:
    runtime = ONNX_RUNTIMES[name]
    pytest.importorskip(runtime.package)
    with pytest.raises(InputError, match=r"invalid file .*none.onnx: no such file"):
        open_file(runtime, tmp_path / "none.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"\x00\x01damaged")
    with pytest.raises(InputError, match=rf"{name} cannot load .*damaged.onnx"):
        open_file(runtime, tmp_path / "damaged.onnx")
    with pytest.raises(InputError, match=rf"{name} needs no_such_package: pip install 'kernelbank\[{runtime.extra}\]'"):
        open_file(replace(runtime, package="no_such_package"), tmp_path / "damaged.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("trunk", "row", "suffix"), OTHER_CASES)
def test_every_row_in_both_trunks_and_formats(trunk: str, row: str, suffix: str, tmp_path: Path) -> None:
    check(trunk, row, suffix, tmp_path)


def test_a_stock_model_of_timm(tmp_path: Path) -> None:
    stock = kernelbank.replace_mixers(timm.create_model("test_vit", num_classes=7), "activation=relu,count")
    kernelbank.export(stock.eval(), tmp_path / "a.pt2")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(run_pt2(tmp_path / "a.pt2", images), stock(images), atol=1e-5)


@pytest.mark.parametrize(("suffix", "half"), [(".onnx", "float16"), (".pt2", "bfloat16"), (".pt2", "float16")])
def test_half_precision_is_smaller_and_near(suffix: str, half: exporting.Half, tmp_path: Path) -> None:
    built = model()
    before = {name: t.clone() for name, t in built.state_dict().items()}
    whole = kernelbank.export(built, tmp_path / f"whole{suffix}")
    halved = kernelbank.export(built, tmp_path / f"half{suffix}", half=half)
    assert halved.dtype == half and halved.bytes < 0.8 * whole.bytes
    assert whole.difference < halved.difference <= halved.tolerance * halved.largest
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())


# ---- forms and inputs ------------------------------------------------------------------------------------


def convolutions_and_products(path: Path) -> tuple[int, int]:
    """How many convolutions with groups are in an ONNX file, and how many products of two computed matrices."""
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    grouped = [n for n in graph.node if n.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in n.attribute)]
    products = [n for n in graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
    return len(grouped), len(products)


@pytest.mark.parametrize(("trunk", "row", "count"), [
    ("plain", "vit", 6), pytest.param("hierarchical", "swin", 6, marks=pytest.mark.slow),
])  # fmt: skip
def test_attention_as_grouped_convolutions(trunk: str, row: str, count: int, tmp_path: Path) -> None:
    """Two for each of 3 blocks on a grid; three for each of 2 with a prefix token, which is a grid of its own."""
    built = model(trunk, row)
    report = kernelbank.export(built, tmp_path / "a.onnx", form="conv", batch=2)
    assert report.difference <= 1e-4 * report.largest
    assert convolutions_and_products(report.path) == (count, 0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(run_onnx(report.path, images), built(images), atol=1e-5)
    kernelbank.export(built, tmp_path / "b.onnx")
    grouped, products = convolutions_and_products(tmp_path / "b.onnx")
    assert grouped == 0 and products > 0


DYNAMIC = [("plain", "relu_attention", ".onnx"), ("hierarchical", "dwnet", ".pt2")]


@pytest.mark.parametrize(("trunk", "row", "suffix"), DYNAMIC)
def test_images_of_any_size(trunk: str, row: str, suffix: str, tmp_path: Path) -> None:
    built = small_model(trunk, row, dynamic_img_size=True)
    report = kernelbank.export(built, tmp_path / f"a{suffix}", dynamic_size=True)
    assert report.inputs.multiple == 8 and report.inputs.sizes == ((32, 32), (32, 48), (56, 40))
    for batch, height, width in ((1, 24, 40), (3, 64, 16)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = built(images)
            assert torch.allclose(
                RUNTIMES[suffix](report.path, images), expected, atol=1e-4 * float(expected.abs().max())
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "conv"}, "invalid form=conv for batches of any size: images are groups of a convolution"),
        ({"form": "conv", "batch": 1, "dynamic_size": True}, "invalid form=conv with dynamic_size"),
        ({"form": "other"}, "invalid form='other'; expected products or conv"),
        ({"batch": 0}, "invalid batch=0; expected a whole number >= 1"),
        ({"dynamic_size": True}, "patch_embed takes images of one size; .* built with dynamic_img_size=True"),
    ],
)
def test_inputs_that_a_form_does_not_take(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        kernelbank.export(model(), tmp_path / "a.pt2", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("vit_relpos", "has a relative table, whose shape depends on the size"),
        ("linformer", "has the matrices of project, whose shape depends on the size"),
        ("nat position=none", r"has support=neighborhood\(3\), whose order of tokens and masks are constants"),
    ],
)
def test_specs_that_take_images_of_one_size(row: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"invalid dynamic_size: blocks.0.attn, .*{reason}"):
        kernelbank.export(small_model("plain", row, dynamic_img_size=True), tmp_path / "a.pt2", dynamic_size=True)


def test_a_convolution_of_a_model_without_mixers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="invalid form=conv for a model without mixers"):
        kernelbank.export(timm.create_model("test_vit").eval(), tmp_path / "a.pt2", form="conv", batch=1)


@pytest.mark.slow
@pytest.mark.parametrize(("trunk", "row"), [("plain", "vit"), ("hierarchical", "swin")])
def test_aotinductor(trunk: str, row: str, tmp_path: Path) -> None:
    built = model(trunk, row)
    report = kernelbank.export(built, tmp_path / "a.aoti.pt2")
    assert report.format == "AOTInductor" and [path.name for path in tmp_path.iterdir()] == ["a.aoti.pt2"]
    program = torch._inductor.aoti_load_package(str(report.path))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = built(images)
    assert torch.allclose(program(images), expected, atol=1e-4 * float(expected.abs().max()))
    about, dtype = read_entry(program.loader.get_metadata()["kernelbank"])
    assert (about, dtype) == (Preprocessing.of(built), "float32")


# ---- metadata --------------------------------------------------------------------------------------------


def test_an_onnx_file_states_its_input_and_preprocessing_and_no_path(tmp_path: Path) -> None:
    about = Preprocessing(input_size=(3, 32, 32), mean=(0.5, 0.25, 0.1), std=(1.0, 2.0, 3.0), white=16.0,
                          interpolation="bilinear", crop_pct=0.9, class_names=("é", "b"))  # fmt: skip
    report = kernelbank.export(model(), tmp_path / "a.onnx", preprocessing=about, opset=18)
    file = onnx.load(report.path)
    assert [(i.domain, i.version) for i in file.opset_import if i.domain == ""] == [("", 18)]
    (image,), (output,) = file.graph.input, file.graph.output
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == [BATCH, 3, 32, 32]
    assert (image.name, output.name, output.type.tensor_type.shape.dim[0].dim_param) == (INPUT, OUTPUT, BATCH)
    assert read_entry({p.key: p.value for p in file.metadata_props}["kernelbank"]) == (about, "float32")
    assert str(Path(kernelbank.__file__).parent).encode() not in report.path.read_bytes()


def test_a_program_states_its_preprocessing_and_no_path(tmp_path: Path) -> None:
    report = kernelbank.export(model(), tmp_path / "a.pt2")
    extra = {"kernelbank.json": ""}
    torch.export.load(report.path, extra_files=extra)
    about, dtype = read_entry(extra["kernelbank.json"])
    assert (about, dtype) == (Preprocessing.of(model()), "float32") and about.input_size == (3, 32, 32)
    assert str(Path(kernelbank.__file__).parent).encode() not in report.path.read_bytes()


@pytest.mark.parametrize("text", ["[]", "{", '{"preprocessing": 3}', '{"preprocessing": {"mean": [1]}}'])
def test_damaged_metadata_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expecting|lacks"):
        read_entry(text)


def test_the_preprocessing_of_stock_models_is_timms() -> None:
    about = Preprocessing.of(timm.create_model("vit_base_patch16_clip_224.openai", depth=1, num_classes=1000))
    assert about.interpolation == "bicubic" and about.mean == timm.data.OPENAI_CLIP_MEAN
    assert about.class_names[0].startswith("tench") and len(about.class_names) == 1000
    assert Preprocessing.of(timm.create_model("resnet18", num_classes=5)).class_names == ()


# ---- what is refused -------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A model with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.weight = fault, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> object:
        y = (x * self.weight.view(-1, 1, 1)).mean((2, 3))
        match self.fault:
            case "tuple":
                return y, y
            case "constant":
                return y * 0
            case "infinite":
                return y / 0
            case "batch of 3":
                return y if len(x) == 3 else y + 1
            case "values":
                return y + 1 if float(y.sum()) > 0 else y
        return y


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tuple", "invalid model: it returns tuple; expected one tensor"),
        ("constant", "the same for every image"),
        ("infinite", "outputs are not finite"),
        ("batch of 3", "cannot trace Wrong for any batch"),
        ("values", "cannot trace Wrong for any batch"),
    ],
)
def test_models_that_cannot_be_exported(fault: str, message: str, tmp_path: Path) -> None:
    about = Preprocessing(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(InputError, match=message):
        kernelbank.export(Wrong(fault).eval(), tmp_path / "a.pt2", preprocessing=about)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    def refused(message: str, name: str = "a.pt2", built: nn.Module | None = None, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            kernelbank.export(model() if built is None else built, tmp_path / name, **options)  # type: ignore[arg-type]

    refused(r"unknown format '.onx'; did you mean '.onnx'\?; expected a name in .onnx, .aoti.pt2, .pt2", "a.onx")
    refused("no such folder", "b/a.pt2")
    refused("in training mode; expected model.eval", built=model().train())
    refused("on meta; expected one on the CPU", built=model().to("meta"))
    refused("invalid opset=7; expected 18 to 23", "a.onnx", opset=7)
    refused("invalid opset=18 for .pt2; expected none", opset=18)
    size = replace(Preprocessing.of(model()), input_size=(3, 30, 32))
    refused(r"invalid input size \(3, 30, 32\): the model does not run on it", preprocessing=size)
    refused("onnxruntime cannot load the ONNX file: .*bfloat16", "a.onnx", half="bfloat16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.pt2").write_text("mine")
    refused("it exists; expected another name")
    (tmp_path / "folder.pt2").mkdir()
    refused("it is a folder", "folder.pt2", overwrite=True)
    assert (tmp_path / "a.pt2").read_text() == "mine"
    kernelbank.export(model(), tmp_path / "a.pt2", overwrite=True)
    assert (tmp_path / "a.pt2").stat().st_size > 10_000


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y + 2e-4 * y.abs().max(), "is not written: its outputs in .* differ by"),
        (lambda y: y * torch.nan, "is not written"),
        (lambda y: y[:1], "outputs of shape"),
    ],
    ids=["values", "nan", "shape"],
)
def test_a_file_with_other_outputs_is_not_kept(
    suffix: str, wrong: Callable[[Tensor], Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS[suffix]

    def open_wrongly(path: Path) -> tuple[Callable[[Tensor], Tensor], str]:
        run, entry = form.open(path)
        return (lambda images: wrong(run(images))), entry

    monkeypatch.setitem(FORMATS, suffix, replace(form, open=open_wrongly))
    with pytest.raises(InputError, match=message):
        kernelbank.export(model(), tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, ".onnx", replace(FORMATS[".onnx"], packages=("onnx", "no_such_package")))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'kernelbank\[train,export\]'"):
        kernelbank.export(model(), tmp_path / "a.onnx")


def test_a_model_too_large_for_one_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelbank.exports.formats.LARGEST_ONNX", 1000)
    with pytest.raises(InputError, match=r"too many weights for an ONNX file: .* or a \.pt2 file"):
        kernelbank.export(model(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: object) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        kernelbank.export(model(), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
