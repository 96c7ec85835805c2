"""`export`: a model as a file that runs without this library, written only if it gives the model's outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kernelbank.errors import InputError, SpecError, require
from kernelbank.exports.formats import FORMATS, Format, format_of
from kernelbank.exports.preprocessing import Preprocessing, read_entry
from kernelbank.exports.runtimes import Run
from kernelbank.exports.shapes import Form, Inputs, check_inputs, multiple_of, traced_form
from kernelbank.files import replace_file
from kernelbank.text import one_line, suggest

T = TypeVar("T")
Half = Literal["float16", "bfloat16"]
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference of an output from the model's that a file may have, as a share of the largest output."""


@dataclass(frozen=True)
class ExportReport:
    """A file that was written: its format and what runs it, its size in bytes, the largest absolute `difference` of its
    outputs from those of the model, the largest absolute output, the `tolerance` for the first as a share of the
    second, the `inputs` that it takes, and the `form` of its mixers."""

    path: Path
    format: str
    runtime: str
    bytes: int
    dtype: str
    difference: float
    largest: float
    tolerance: float
    inputs: Inputs
    form: Form


class _Program(nn.Module):
    """The model in its dtype between an input and outputs in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(images.to(self.dtype))
        return outputs.float()


def export(
    model: nn.Module,
    path: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    half: Half | None = None,
    opset: int | None = None,
    form: Form = "products",
    batch: int | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> ExportReport:
    """Write `model` to an ONNX file (``.onnx``), a program of torch.export (``.pt2``), or one that AOTInductor has
    compiled for this machine (``.aoti.pt2``), for batches of any size.

    The input ``images`` (B, C, H, W) and the output ``outputs`` are in float32. The file is loaded again, in
    onnxruntime or torch, and compared with `model` on random images in batches of other sizes than the traced one. Only
    then does it get its name. Its metadata has, under ``kernelbank``, a JSON object with the `Preprocessing` and the
    dtype of the weights.

    Args:
        model: A model in eval mode on the CPU, with one tensor as input and as output.
        preprocessing: The input size and normalisation. Default: `Preprocessing.of`.
        half: The dtype in which the weights are stored and the file computes. Default: that of the model.
        opset: The version of ONNX's operator set. Default: that of torch.onnx.
        form: How mixers of this library are written. ``conv`` writes attention as grouped convolutions, for a fixed
            batch and images of one size.
        batch: The number of images that the file takes. Default: any.
        dynamic_size: Whether the file takes images of any size, in multiples of the pixels that a position of the last
            stage covers. The model must take them too (``dynamic_img_size=True``).
        overwrite: Whether a file that exists is replaced.
        progress: Called with a few words before each step.

    Raises:
        InputError: If a package is missing, the path or an option is invalid, the model cannot be traced or written in
            this format, or the outputs of the file differ by more than `TOLERANCES`. No file is written then.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    target = _check(path, model, opset, overwrite)
    check_inputs(model, form, batch, dynamic_size)
    about = Preprocessing.of(model) if preprocessing is None else preprocessing
    channels, height, width = about.input_size
    inputs = Inputs(channels, (height, width), batch, dynamic_size, multiple_of(model) if dynamic_size else 1)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = own if half is None else getattr(torch, half)
    expected = [(images, _outputs(model, images, own)) for images in inputs.compared()]
    _check_outputs([outputs for _, outputs in expected])
    progress("tracing")
    with traced_form(form):
        program = _trace(copy.deepcopy(model).to(dtype) if dtype != own else model, dtype, inputs)
    name = str(dtype).removeprefix("torch.")
    entry = about.metadata(name)
    reports: list[ExportReport] = []

    def write(beside: Path) -> None:
        progress(f"writing {target.name}")
        _calling(target, "write", lambda: target.write(program, beside, entry, opset))
        progress(f"comparing in {target.runtime}")
        run, found = _calling(target, "load", lambda: target.open(beside))
        if read_entry(found)[0] != about:
            raise InputError(f"{path}: its metadata is not what was written")
        difference = max(_difference(target, run, images, outputs) for images, outputs in expected)
        largest = max(float(outputs.abs().max()) for _, outputs in expected)
        size = beside.stat().st_size
        numbers = size, name, difference, largest, TOLERANCES[dtype]
        reports.append(ExportReport(path, target.name, target.runtime, *numbers, inputs, form))
        if not difference <= TOLERANCES[dtype] * largest:
            raise InputError(f"{path} is not written: its outputs in {target.runtime} differ by {difference:.1e} from "
                             f"the model's, which reach {largest:.1e}; expected at most {TOLERANCES[dtype]:.0e} of "
                             "that")  # fmt: skip

    replace_file(path, write)
    return reports[0]


# ---- what is refused -------------------------------------------------------------------------------------


def _check(path: Path, model: nn.Module, opset: int | None, overwrite: bool) -> Format:
    """The format of `path`. Raises InputError for what cannot be exported there."""
    form = check_path(path, opset, overwrite)
    if any(module.training for module in model.modules()):
        raise InputError("invalid model in training mode; expected model.eval()")
    if devices := {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu"}:
        raise InputError(f"invalid model on {min(devices)}; expected one on the CPU: model.cpu()")
    return form


def check_path(path: Path, opset: int | None = None, overwrite: bool = False) -> Format:
    """The format of the file `path`. Raises InputError if it cannot be written there or in this operator set."""
    form = format_of(path)
    if form is None:
        raise InputError(f"invalid output {path}: unknown format {path.suffix!r}{suggest(path.suffix, FORMATS)}; "
                         f"expected a name in {', '.join(FORMATS)}")  # fmt: skip
    require(f"export to {form.name}", "train,export", *form.packages)
    if opset is not None and form.opsets is None:
        raise InputError(
            f"invalid opset={opset} for {form.suffix}; expected none, since {form.name} has no operator sets"
        )
    if opset is not None and form.opsets is not None and opset not in form.opsets:
        raise InputError(f"invalid opset={opset}; expected {form.opsets[0]} to {form.opsets[-1]}")
    if path.is_dir():
        raise InputError(f"invalid output {path}: it is a folder; expected a file")
    if path.exists() and not overwrite:
        raise InputError(f"invalid output {path}: it exists; expected another name, or overwrite")
    if not path.parent.is_dir():
        raise InputError(f"invalid output {path}: no such folder {path.parent}")
    return form


def _check_outputs(results: list[Tensor]) -> None:
    """Raise InputError for outputs on which a comparison would show nothing."""
    outputs = torch.cat([y for y in results if y.shape[1:] == results[0].shape[1:]])
    if not all(bool(y.isfinite().all()) for y in results):
        raise InputError("invalid model: its outputs are not finite; expected trained or initial weights")
    if bool((outputs == outputs[:1]).all()):
        raise InputError("invalid model: its outputs are the same for every image, so that no comparison would show a "
                         "difference; expected weights that are not zero")  # fmt: skip


# ---- steps -----------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The model's outputs in float32. Raises InputError if it cannot run the images or gives no tensor."""
    try:
        with torch.no_grad():
            outputs = model(images.to(dtype))
    except (SpecError, RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"invalid input size {tuple(images.shape[1:])}: the model does not run on it: "
                         f"{one_line(error, 200)}") from None  # fmt: skip
    if not isinstance(outputs, Tensor):
        raise InputError(f"invalid model: it returns {type(outputs).__name__}; expected one tensor")
    return outputs.float()


def _trace(model: nn.Module, dtype: torch.dtype, inputs: Inputs) -> ExportedProgram:
    """The program of a model for `inputs`. Raises InputError if torch.export cannot trace it."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch on its own code
            program = torch.export.export(
                _Program(model, dtype).eval(), (inputs.traced(),), dynamic_shapes=inputs.axes(),
            )  # fmt: skip
    except Exception as error:
        raise InputError(f"torch.export cannot trace {type(model).__name__} for {inputs}: "
                         f"{one_line(error, 300)}") from error  # fmt: skip
    for node in program.graph.nodes:  # names source files of this machine
        node.meta.pop("stack_trace", None)
    return program


def _calling(form: Format, verb: str, call: Callable[[], T]) -> T:
    """`call()`. Raises InputError for what exporters and runtimes raise, which is anything."""
    try:
        return call()
    except (InputError, OSError):
        raise
    except Exception as error:
        what = (
            f"torch cannot write {form.name}"
            if verb == "write"
            else f"{form.runtime} cannot {verb} the {form.name} file"
        )
        raise InputError(f"{what}: {one_line(error, 300)}") from error


def _difference(form: Format, run: Run, images: Tensor, expected: Tensor) -> float:
    """The largest absolute difference. Raises InputError for outputs of another shape or that are not finite."""
    with torch.no_grad():
        outputs = _calling(form, "run", lambda: run(images))
    if outputs.shape != expected.shape:
        raise InputError(f"the {form.name} file gives outputs of shape {tuple(outputs.shape)} for {len(images)} images;"
                         f" the model's are {tuple(expected.shape)}")  # fmt: skip
    return float((outputs - expected).abs().nan_to_num(torch.inf).max())
