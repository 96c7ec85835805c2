"""What a graph of a mixer holds: constants for what the grid alone decides, and windows without an order of tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from equality import build, draw
from strategies import Host

from kernelbank.atlas import ROWS
from kernelbank.ops import geometry
from kernelbank.spec import MixerSpec

COMPUTED = {"arange", "argsort", "sort", "topk", "eye", "tensor", "floor_divide", "floordiv", "mod",
            "remainder", "ones", "bitwise_and", "and_", "eq", "iota", "full", "zeros"}  # fmt: skip
"""The operations that geometries are computed with."""
SUPPORTS = (
    "swin support=window(2)", "swin support=window(3, 1)", "swin support=window(2, 1, timm)",
    "swin support=window(3, 1, mmpretrain)", "maxvit_grid support=grid(2)", "dwsa_window support=window(3, 1)",
    "nat support=neighborhood(3)", "vit_relpos",
)  # fmt: skip
TEXTS = (*ROWS, *SUPPORTS)


def counted(graph: torch.fx.Graph) -> Counter[str]:
    """How many nodes of a graph call each function, by its name without namespace and overload."""
    targets = [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]
    return Counter(t if isinstance(t, str) else getattr(t, "_opname", t.__name__) for t in targets)


def exported(text: str, prefix: int = 1) -> torch.export.ExportedProgram:
    mixer = build(MixerSpec.parse(text).at_block(1), Host(32, 2, (6, 4), prefix, 2), dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.export.export(mixer, (draw(mixer, 2)[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("text", TEXTS)
def test_an_exported_graph_computes_no_geometry(text: str) -> None:
    nodes = counted(exported(text).graph)
    assert nodes and not nodes.keys() & COMPUTED


@pytest.mark.parametrize("text", SUPPORTS)
def test_a_compiled_graph_computes_no_geometry(text: str) -> None:
    graphs = list[torch.fx.Graph]()

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    torch.compiler.reset()
    mixer = build(MixerSpec.parse(text).at_block(1), Host(32, 2, (6, 4), 1, 2), dtype=torch.float32).eval()
    x = draw(mixer, 2)[0]
    with torch.no_grad():
        y = torch.compile(mixer, fullgraph=True, backend=backend)(x)
        assert torch.allclose(y, mixer(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 and not counted(graphs[0]).keys() & COMPUTED


@pytest.mark.parametrize("text", ["swin support=window(2)", "dwsa_window support=window(2)"])
def test_windows_that_divide_the_grid_are_reshapes(text: str) -> None:
    """One product of queries and keys for all windows. The only entries taken by index are those of the table."""
    nodes = counted(exported(text, prefix=0).graph)
    assert nodes["index_select"] == 1 and nodes["index"] == 0
    assert nodes["cat"] == nodes["pad"] == 0


def test_a_shift_is_a_roll_and_a_constant_mask() -> None:
    program = exported("swin support=window(2, 1)", prefix=0)
    assert counted(program.graph)["roll"] == 2
    masks = [t for t in program.constants.values() if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
    assert [tuple(mask.shape) for mask in masks] == [(6, 4, 4)]


def test_a_constant_that_would_fill_the_file_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [t for t in exported("vit_relpos").constants.values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in kept) >= 25 * 25
    monkeypatch.setattr(geometry, "MOST_EXPORTED", 25 * 25 - 1)
    program = exported("vit_relpos")
    assert "arange" in counted(program.graph)
    assert not any(isinstance(t, torch.Tensor) and t.numel() >= 25 * 25 for t in program.constants.values())


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("text", ["swin support=window(2, 1)", "dwsa_window support=window(2, 1)", "vit_relpos"])
def test_an_onnx_graph_sorts_nothing(text: str) -> None:
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(exported(text, prefix=0), dynamo=True, verbose=False)
    assert program is not None
    kinds = Counter(node.op_type for node in program.model.graph)
    assert kinds["MatMul"] and not kinds.keys() & {"TopK", "Range", "Mod", "EyeLike", "NonZero", "Loop", "Scan"}
