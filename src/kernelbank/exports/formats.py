"""The formats of exported files: each writes a traced program with an entry of metadata, and runs the file again."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import ExportedProgram

from kernelbank.errors import InputError
from kernelbank.exports.preprocessing import ENTRY
from kernelbank.exports.runtimes import BATCH, HEIGHT, INPUT, OUTPUT, WIDTH, Run, open_onnxruntime

LARGEST_ONNX = 2**31 - 2**24
"""The bytes of weights that fit in one ONNX file, whose messages have at most 2 GiB, with room for the graph."""


@dataclass(frozen=True)
class Format:
    """A format of files. `write(program, path, entry, opset)` writes one, `open(path)` loads one and returns its
    function and its entry. `runtime` is what runs it, `packages` are what it needs, and `opsets` is the range of the
    operator set version, None without one."""

    name: str
    suffix: str
    runtime: str
    packages: tuple[str, ...]
    opsets: range | None
    write: Callable[[ExportedProgram, Path, str, int | None], None]
    open: Callable[[Path], tuple[Run, str]]


# ---- torch.export ----------------------------------------------------------------------------------------

_EXTRA = f"{ENTRY}.json"


def _write_program(program: ExportedProgram, path: Path, entry: str, opset: int | None) -> None:
    buffer = io.BytesIO()  # torch warns about names that do not end in .pt2, as those of temporary files
    with _quiet():
        torch.export.save(program, buffer, extra_files={_EXTRA: entry})
    path.write_bytes(buffer.getbuffer())


def _open_program(path: Path) -> tuple[Run, str]:
    extra = {_EXTRA: ""}
    module = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra).module()
    found: Any = extra[_EXTRA]
    return module, found.decode() if isinstance(found, bytes) else str(found)


# ---- AOTInductor -----------------------------------------------------------------------------------------


def _write_compiled(program: ExportedProgram, path: Path, entry: str, opset: int | None) -> None:
    named = path.with_name(f"{path.name}.pt2")  # the name that AOTInductor asks for
    try:
        with _quiet("torch._inductor", "torch.utils.cpp_extension"):
            settings = {"aot_inductor.metadata": {ENTRY: entry}}
            torch._inductor.aoti_compile_and_package(program, package_path=str(named), inductor_configs=settings)
        named.replace(path)
    finally:
        named.unlink(missing_ok=True)


def _open_compiled(path: Path) -> tuple[Run, str]:
    with TemporaryDirectory() as folder:
        named = Path(folder) / "model.pt2"
        named.symlink_to(path.resolve())
        program: Any = torch._inductor.aoti_load_package(str(named))
    return program, program.loader.get_metadata()[ENTRY]


# ---- ONNX ------------------------------------------------------------------------------------------------


def _write_onnx(program: ExportedProgram, path: Path, entry: str, opset: int | None) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > LARGEST_ONNX:
        raise InputError(f"too many weights for an ONNX file: {size / 1e9:.1f} GB; expected at most "
                         f"{LARGEST_ONNX / 1e9:.1f} GB, or a .pt2 file")  # fmt: skip
    with _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], opset_version=opset
        )
    assert made is not None
    model = made.model
    if opset is not None and model.opset_imports[""] != opset:
        raise InputError(f"invalid opset={opset}: an operator of the model needs a newer one; expected at least "
                         f"{model.opset_imports['']}")  # fmt: skip
    _name_axes(made)
    for node in model.graph.all_nodes():  # the exporter's notes name source files of this machine
        node.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props[ENTRY] = entry
    path.write_bytes(made.model_proto.SerializeToString())


def _name_axes(made: Any) -> None:
    """Give the dynamic axes of the input their names, in place of the exporter's symbols."""
    shape = made.model.graph.inputs[0].shape
    names = {0: BATCH, 2: HEIGHT, 3: WIDTH}
    made.rename_axes({shape[axis]: name for axis, name in names.items() if not isinstance(shape[axis], int)})


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Hide the warnings and logs of exporters: what they say is checked on the file."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


FORMATS = {
    form.suffix: form
    for form in (
        Format("ONNX", ".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), range(18, 24), _write_onnx,
               open_onnxruntime),
        Format("AOTInductor", ".aoti.pt2", "torch", (), None, _write_compiled, _open_compiled),
        Format("torch.export", ".pt2", "torch", (), None, _write_program, _open_program),
    )
}  # fmt: skip
"""The formats by the suffix of their files, longer ones first."""


def format_of(path: Path) -> Format | None:
    """The format of a file by the end of its name."""
    return next((form for suffix, form in FORMATS.items() if path.name.endswith(suffix)), None)
