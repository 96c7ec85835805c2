"""Runtimes of ONNX files on the CPU, with as many threads as torch: onnxruntime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernelbank.errors import InputError, require
from kernelbank.exports.preprocessing import ENTRY
from kernelbank.text import one_line, printable

INPUT, OUTPUT = "images", "outputs"
BATCH, HEIGHT, WIDTH = "batch", "height", "width"
"""The names of the input, the output and the dynamic axes of a file that `export` wrote."""

Run = Callable[[Tensor], Tensor]
"""images (B, C, H, W) -> outputs (B, ...)."""


def open_onnxruntime(path: Path) -> tuple[Run, str]:
    """The function of a file that `export` wrote, and its entry of metadata."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run, session.get_modelmeta().custom_metadata_map.get(ENTRY, "")


def open_openvino(path: Path) -> Run:
    """The function of an ONNX file in OpenVINO, in float32: by default OpenVINO uses bfloat16 where a CPU is fast in
    it."""
    import openvino  # noqa: PLC0415

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled([images.numpy()])[0].copy())

    return run


@dataclass(frozen=True)
class Runtime:
    """What runs an ONNX file: its name, the package that it needs, and the extra with it."""

    name: str
    package: str
    extra: str
    open: Callable[[Path], Run]


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", "onnxruntime", "export", lambda path: open_onnxruntime(path)[0]),
        Runtime("OpenVINO", "openvino", "openvino", open_openvino),
    )
}


def open_file(runtime: Runtime, path: Path) -> Run:
    """The function of the ONNX file at `path`.

    Raises:
        InputError: If the runtime is not installed, or cannot load the file.
    """
    require(runtime.name, runtime.extra, runtime.package)
    if not path.is_file():
        raise InputError(f"invalid file {printable(path)}: no such file; expected an ONNX file")
    try:
        return runtime.open(path)
    except Exception as error:  # of any type
        raise InputError(f"{runtime.name} cannot load {printable(path)}: {one_line(error, 200)}") from error
