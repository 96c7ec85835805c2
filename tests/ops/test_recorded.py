"""Graphs that are recorded for other batches, and batches without images."""

from __future__ import annotations

import warnings

import pytest
import torch
from equality import build, draw
from strategies import Host
from test_derivatives import TEXTS

from kernelbank import Mixer
from kernelbank.atlas import ROWS
from kernelbank.spec import MixerSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def traced(mixer: Mixer, batch: int) -> torch.jit.ScriptModule:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and shapes of tokens become constants
        return torch.jit.trace(mixer, (draw(mixer, batch)[0],), check_trace=False)


@pytest.mark.parametrize("name", TEXTS)
def test_a_trace_of_one_image_is_right_for_several(name: str) -> None:
    """One image has one predicted kernel, which looks like one kernel for all images."""
    mixer = build(MixerSpec.parse(TEXTS[name]).at_block(1), Host(32, 2, (3, 4), 1, 1)).eval()
    graph, x = traced(mixer, 1), draw(mixer, 3, 7)[0]
    with torch.no_grad():
        expected = mixer(x)
        assert torch.allclose(graph(x), expected, atol=1e-6 * (1 + float(expected.abs().max())))


@pytest.mark.parametrize("text", ["dconv", "condconv", "condconv_dw", "conv", "dwconv"])
@pytest.mark.parametrize("batch", [1, 2])
def test_traces_on_wide_grids(text: str, batch: int) -> None:
    mixer = build(MixerSpec.parse(text), Host(8, 2, (21, 21), 0, 1), dtype=torch.float32).eval()
    graph = traced(mixer, batch)
    with torch.no_grad():
        for images in (1, 2, 5):
            x = draw(mixer, images, 7)[0].float()
            assert torch.allclose(graph(x), mixer(x), rtol=1e-4, atol=1e-4), images


@pytest.mark.parametrize("name", ["dwsa", "layernorm_attention", "dconv", "swin", "relu_attention", "ddwconv"])
def test_an_exported_mixer_learns(name: str) -> None:
    """Exported without gradients, run with them: the graph writes to nothing in place."""
    mixer = build(MixerSpec.parse(TEXTS[name]).at_block(1), Host(16, 2, (4, 4), 0, 2)).eval()
    x, upstream = draw(mixer, 2)
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        exported = torch.export.export(mixer, (x,), dynamic_shapes=({0: batch},)).module()
    wide, upstream = torch.cat([x, x + 1]).requires_grad_(), torch.cat([upstream, upstream])
    (ours,) = torch.autograd.grad((exported(wide) * upstream).sum(), wide)
    (theirs,) = torch.autograd.grad((mixer(wide) * upstream).sum(), wide)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("grid", [(3, 4), (21, 21)])
def test_a_batch_without_images_gives_an_empty_output(row: str, grid: tuple[int, int]) -> None:
    mixer = Mixer(MixerSpec.parse(row).at_block(1), 32, 2, grid).eval()
    x = torch.empty(0, grid[0] * grid[1], 32)
    with torch.no_grad():
        assert mixer(x).shape == x.shape
    y = mixer(x.requires_grad_())
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in mixer.parameters())
