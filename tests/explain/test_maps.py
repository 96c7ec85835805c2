"""Maps and kernels, applied to the values or the operand, give the mixer's output before its last linear layer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from equality import build, draw
from strategies import Host, choose_host, choose_spec

from kernelbank.atlas import ROWS
from kernelbank.errors import InputError
from kernelbank.explanation.capture import explain
from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.maps import _context, layer_maps
from kernelbank.explanation.statistics import statistics
from kernelbank.ops import reference
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import crop, pad_tokens
from kernelbank.spec import MixerSpec, SpecError, TwoStep

HOSTS = [
    Host(32, 4, (5, 5), 0, 2), Host(32, 4, (4, 6), 1, 1), Host(64, 2, (3, 8), 2, 2), Host(32, 1, (9, 8), 0, 1),
]  # fmt: skip


def defined(mixer: object, x: torch.Tensor) -> torch.Tensor:
    """The output before the last linear layer by the literal definition, on the padded grid."""
    p, s = _context(mixer, x, mixer.grid, None)  # type: ignore[attr-defined, arg-type]
    operand, source = enter(pad_tokens(x, s.geo), p, s)
    core = reference.two_step if isinstance(s.spec.kernel, TwoStep) else reference.one_step
    return core(operand, source, p, s)


def check(spec: MixerSpec, host: Host, seed: int = 0) -> LayerMaps:
    mixer = build(spec, host, seed).eval()
    x, _ = draw(mixer, host.batch, seed + 1)
    (layer,) = explain(mixer, x)
    with torch.no_grad():
        p, s = _context(mixer, x, host.grid, None)
        expected = defined(mixer, x)
        ours = layer.output().values.transpose(1, 2).flatten(2)
        wanted = expected[:, layer.rows]
        scale = 1 + float(wanted.abs().max())
        assert ours.shape == wanted.shape
        assert float((ours - wanted).abs().max()) / scale < 1e-9, f"{spec} {host}"
        if s.geo.layout is None:  # the last linear layer makes it the output of the model's own path
            y = crop(leave(ours, p, s), s.geo)
            assert float((y - mixer(x)).abs().max() / (1 + y.abs().max())) < 1e-9
    return layer


@pytest.mark.parametrize("host", HOSTS, ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_atlas(row: str, host: Host) -> None:
    for block in (0, 1):
        check(MixerSpec.parse(row).at_block(block), host)


def test_random_specs() -> None:
    for seed in range(200):
        choose = random.Random(seed).choice
        check(choose_spec(choose), choose_host(choose), seed)


@pytest.mark.parametrize("row", ROWS)
def test_a_part_is_the_part_of_the_whole(row: str) -> None:
    """Heads and positions that were asked for alone equal those of all maps."""
    spec, host = MixerSpec.parse(row).at_block(1), replace(HOSTS[1], grid=(9, 8))
    mixer = build(spec, host).eval()
    x, _ = draw(mixer, 1)
    (whole,) = explain(mixer, x)
    heads, positions = ([0] if len(whole.heads) == 1 else [2, 1]), [0, 30, (8, 7)]
    (part,) = explain(mixer, x, heads=heads, positions=positions)
    assert part.positions == (0, 30, 72) and part.heads == tuple(heads)
    rows = list(part.positions)
    torch.testing.assert_close(part.output().values, whole.output().values[:, heads][:, :, rows])
    for field in ("static", "regions"):
        if getattr(whole, field) is None:
            assert getattr(part, field) is None
    if whole.scores is not None and whole.weights is not None and part.weights is not None:
        both = (whole.weights.values[:, heads][:, :, rows], part.weights.values)
        torch.testing.assert_close(both[1], both[0][..., : both[1].shape[-1]])


def test_the_parts_of_a_map() -> None:
    """Scores plus the static part, through the activation, are the weights; the effective kernel of a depth-wise mixer
    is their sum."""
    host = Host(32, 4, (4, 5), 1, 2)
    layer = check(MixerSpec.parse("vit_relpos"), host)
    assert layer.weights is not None and layer.dynamic is not None and layer.static is not None
    softmax = torch.softmax(layer.dynamic.values + layer.static.values, -1)
    torch.testing.assert_close(layer.weights.values, softmax)
    assert layer.weights.sizes == {"image": 2, "head": 4, "position": 21, "kernel": 21}
    assert layer.effective is layer.weights
    layer = check(MixerSpec.parse("dwsa"), host)
    assert layer.dynamic is not None and layer.static is not None and layer.effective is not None
    torch.testing.assert_close(layer.effective.values, layer.dynamic.values + layer.static.values)
    q = layer.operand.values.unflatten(-1, (4, 8)).mean(-1).transpose(1, 2)
    torch.testing.assert_close(layer.dynamic.values[..., 0], q / 21)


MASKED = ["vit", "vit_relpos activation=relu,count", "swin support=window(3, shift=1)", "dwsa", "external_attention",
          "vit activation=softmax@positions", "maxvit_grid support=grid(2)", "nat support=neighborhood(3)",
          "iddwconv support=window(3)"]  # fmt: skip


@pytest.mark.parametrize("text", MASKED)
def test_masks_that_differ_between_images(text: str) -> None:
    host = Host(32, 4, (4, 5), 1, 3)
    mixer = build(MixerSpec.parse(text), host).eval()
    x, _ = draw(mixer, 3)
    mask = torch.rand(3, 21, 21, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :, 0] = True
    try:
        expected = mixer(x, attn_mask=mask)
    except SpecError:
        with pytest.raises(SpecError, match="invalid attn_mask"):
            layer_maps("", mixer, x, host.grid, mask, None, None)
        return
    layer = layer_maps("", mixer, x, host.grid, mask, None, None)
    p, s = _context(mixer, x, host.grid, mask)
    with torch.no_grad():
        y = leave(layer.output().values.transpose(1, 2).flatten(2), p, s)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert layer.visible is not None
    for part in (layer.weights, layer.effective):
        assert part is None or not bool(part.values[~layer.visible[:, None].expand_as(part.values)].any())
    (first, *_) = statistics([layer])
    assert layer.scores is None or first.seen == float(layer.visible[:, 1:].sum(-1).double().mean())


def test_linformer_is_carried_back_to_the_image() -> None:
    """The effective kernel of `project` weighs the kernels of the image: with the values before the mixture."""
    host = Host(32, 4, (4, 5), 0, 1)
    layer = check(MixerSpec.parse("linformer mix=project(6)"), host)
    assert layer.effective is not None and layer.mixing is not None and layer.weights is not None
    assert layer.weights.sizes["kernel"] == 6 and layer.effective.sizes["kernel"] == 20


def test_windows_say_where_they_lie() -> None:
    host = Host(32, 4, (9, 8), 0, 1)
    layer = check(MixerSpec.parse("swin support=window(4, shift=2)"), host)
    assert layer.regions is not None and layer.index is not None
    regions = layer.regions.values.reshape(9, 8, 4)
    assert regions[0, 0].tolist() == [0, 0, 2, 2] and regions[3, 3].tolist() == [2, 2, 6, 6]
    assert regions[8, 7].tolist() == [6, 6, 9, 8]
    assert layer.index.values[0].tolist()[:5] == [0, 1, 8, 9, -1]
    for pad in ("timm", "mmpretrain"):
        layer = check(MixerSpec.parse(f"swin support=window(4, shift=2, pad={pad})"), host)
        assert layer.regions is not None and layer.origin is not None
        assert bool((layer.origin.values == -1).any())
        top, left, bottom, right = layer.regions.values.unbind(1)
        y, x = torch.arange(72) // 8, torch.arange(72) % 8
        assert bool(((top <= y) & (y < bottom) & (left <= x) & (x < right)).all())


def test_errors_name_what_is_wrong() -> None:
    host = Host(32, 4, (4, 5), 0, 1)
    mixer = build(MixerSpec.parse("vit"), host).eval()
    x, _ = draw(mixer, 1)
    with pytest.raises(InputError, match=r"invalid heads=4 in layer .*; expected 0 to 3"):
        explain(mixer, x, heads=[4])
    with pytest.raises(InputError, match=r"invalid positions=20 in layer .*; expected a token from 0 to 19 or"):
        explain(mixer, x, positions=[20])
    with pytest.raises(InputError, match=r"invalid positions=\(4, 0\)"):
        explain(mixer, x, positions=[(4, 0)])
    with pytest.raises(InputError, match="unknown layer 'blocks'"):
        explain(mixer, x, layers=["blocks"])
    with pytest.raises(InputError, match="invalid model without mixers: Linear"):
        explain(torch.nn.Linear(2, 2), x)
    norm = build(MixerSpec.parse("dwnet"), host)
    with pytest.raises(InputError, match=r"training mode with a BatchNorm.*expected model.eval\(\)"):
        explain(norm.train(), x)
