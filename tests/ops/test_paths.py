"""Every path equals the literal definition: outputs, every gradient and every statistic, over random specs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from equality import Run, build, draw, normal, run, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Host, choose_host, choose_spec, hosts, specs
from torch import Tensor

from kernelbank import Mixer, use_path
from kernelbank.atlas import ROWS
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.machine import machine
from kernelbank.ops.paths import LINEAR_PATHS, MIXER_PATHS, POSITION_PATHS, SLOTS, pointwise, triton
from kernelbank.ops.paths.path import PathError
from kernelbank.spec import CELLS, MixerSpec
from kernelbank.spec.axes import AXES, Window
from kernelbank.spec.pipeline import STEPS

SPECS = 400
SERVED = 25
ON_GPUS = [name for name in SLOTS if name.startswith("triton_")]  # test_kernels and test_device
FASTER = [name for name in SLOTS if name != "reference" and name not in ON_GPUS]
WITHOUT_GRADIENT = {"mkldnn", "pointwise_onednn"}  # float32 alone: the next tests but one


def serving(
    mixer: Mixer, x: Tensor, upstream: Tensor, mask: Tensor | None = None, paths: Collection[str] = tuple(FASTER)
) -> Iterator[tuple[str, Run]]:
    """Every path that serves, and its run with every gradient. Paths of all slots: a path that refuses says so."""
    for name in paths:
        with suppress(PathError):
            yield name, run(mixer, name, x, upstream, mask)


def words_of(spec: MixerSpec) -> set[str]:
    """Every value, by word, that the spec holds: `support window`, `activation relu`, `pad timm`, ..."""
    held = {f"{name} {str(getattr(spec, name)).partition('(')[0]}" for name in CELLS if name != "activation"}
    held |= {f"step {step.name}" for step in spec.activation} | {f"axis {step.axis}" for step in spec.activation}
    return held | ({f"pad {spec.support.pad}"} if isinstance(spec.support, Window) else set())


def every_word() -> set[str]:
    words = {
        f"{n} {axis.show(v).partition('(')[0]}" for n, axis in AXES.items() if n != "activation" for v in axis.examples
    }
    words |= {f"step {name}" for name in STEPS} | {"axis kernels", "axis positions"}
    return words | {"pad masked", "pad mmpretrain", "pad timm"}


def check_spec(seed: int, seen: Counter[str], paths: Collection[str] = tuple(FASTER)) -> dict[str, float]:
    """One random spec in a random host on every path against the definition: the errors by path."""
    choose = random.Random(seed).choice
    spec, host, training = choose_spec(choose), choose_host(choose), choose((True, False))
    seen.update(words_of(spec))
    if training and spec.frame == "bn_relu":
        host = replace(host, batch=2)  # BatchNorm has no variance over one value
    mixer = build(spec, host, seed).train(training)
    x, upstream = draw(mixer, host.batch, seed + 1)
    defined, errors = run(mixer, "reference", x, upstream), {}
    for path, done in serving(mixer, x, upstream, paths=paths):
        errors[path], where = worst(done, defined)
        assert errors[path] < 1e-9, f"seed {seed}, {path}, {spec}, {host}: {where} differs by {errors[path]:.1e}"
    return errors


def test_random_specs_in_float64() -> None:
    seen: Counter[str] = Counter()
    served: Counter[str] = Counter()
    worst_error = 0.0
    for seed in range(SPECS):
        errors = check_spec(seed, seen)
        served.update(errors.keys())
        worst_error = max(worst_error, *errors.values())
    print(f"\n{SPECS} random specs, worst {worst_error:.1e}; comparisons: {dict(served)}; values: {dict(seen)}")
    assert not every_word() - seen.keys(), f"never drawn: {sorted(every_word() - seen.keys())}"
    assert min(seen.values()) >= 3


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several."""
    monkeypatch.setattr(pointwise, "CHUNK", 40)
    monkeypatch.setattr(pointwise, "SMALL", 20)


def unsupported(path: str, s: Context, call: Call) -> str | None:
    """Why a path of any slot does not support the call."""
    if path in LINEAR_PATHS:
        return LINEAR_PATHS[path].unsupported(call, machine())
    return {**MIXER_PATHS, **POSITION_PATHS}[path].unsupported(s, call, machine())


def served(path: str, call: Call, first: int) -> Iterator[tuple[int, MixerSpec, Host]]:
    """SERVED specs, with the seed each was drawn by, that a path serves: few meet the special ones by chance."""
    found = 0
    for seed in range(first, first + 60_000):
        choose = random.Random(seed).choice
        spec, host, training = choose_spec(choose), choose_host(choose), choose((True, False))
        geo = geometry(spec, host.grid, host.prefix)
        if unsupported(path, Context(spec, host.dim, host.num_heads, geo, training and call.grad), call):
            continue
        yield seed, spec, host
        found += 1
        if found == SERVED:
            return
    raise AssertionError(f"{path}: only {found} specs")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", [name for name in FASTER if name not in WITHOUT_GRADIENT])
def test_a_path_over_specs_that_it_serves(path: str) -> None:
    for seed, _, _ in served(path, Call(dtype=torch.float64, grad=True), 1_000_000):
        check_spec(seed, Counter(), (path,))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("path", sorted(WITHOUT_GRADIENT))
def test_a_path_without_gradient_over_specs_that_it_serves(path: str) -> None:
    for seed, spec, host in served(path, Call(dtype=torch.float32), 2_000_000):
        mixer = build(spec, host, seed).eval()
        x = draw(mixer, host.batch, seed + 1)[0]
        with torch.no_grad():
            with use_path("reference"):
                defined = mixer(x)
            with use_path(path):
                y = mixer.float()(x.float())
        # exp and relu2 make outputs of any size
        assert float((y - defined).abs().max() / defined.abs().max().clamp(min=1)) < 1e-4, f"seed {seed}, {spec}"


@pytest.mark.parametrize("chunk", [1, 50, 2000])
def test_a_table_read_in_strips(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table too large for its matrix is read row by row of the grid, whatever rows a chunk holds."""
    monkeypatch.setattr(pointwise, "CHUNK", chunk)
    monkeypatch.setattr(pointwise, "LARGEST", 1)
    mixer = build(MixerSpec.parse("vit_relpos activation=log_count,scale(0.5),gelu,count"), Host(8, 2, (4, 5), 0, 2))
    x = draw(mixer.eval(), 2)[0]
    with torch.no_grad():
        made = {}
        for path in ("reference", "pointwise"):
            with use_path(path):
                made[path] = mixer(x)
        with use_path("pointwise_onednn"):
            made["pointwise_onednn"] = mixer.float()(x.float())
    assert float((made["pointwise"] - made["reference"]).abs().max()) < 1e-9
    assert float((made["pointwise_onednn"] - made["reference"]).abs().max()) < 1e-4


POSITIONS = [name for name in POSITION_PATHS if name != triton.POSITION.name]  # it has tests of its own


@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_kept_of_a_table_does_not_depend_on_autocast(position: str) -> None:
    """A call under autocast first, one without it next: the kept matrix or spectrum serves both."""
    mixer = build(MixerSpec.parse("dwsa"), Host(8, 2, (6, 5), 0, 2), dtype=torch.float32).eval()
    x = draw(mixer, 2)[0]
    with torch.no_grad():
        with use_path("reference"):
            defined = mixer(x)
        with use_path(position):
            with torch.autocast(x.device.type, torch.bfloat16):
                mixer(x)
            y = mixer(x)
    assert float((y - defined).abs().max()) < 1e-5


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("grad", [True, False])
def test_an_empty_batch_on_every_positional_operator(position: str, grad: bool) -> None:
    mixer = Mixer("dwsa", 8, 2, (3, 4), prefix=1)
    with torch.set_grad_enabled(grad), use_path(position):
        y = mixer(torch.randn(0, 13, 8))
        if grad:
            y.sum().backward()
            assert all(p.grad is not None and not p.grad.any() for p in mixer.parameters())
    assert y.shape == (0, 13, 8)


def test_an_output_can_be_written_to() -> None:
    """Without a static conv behind it the output is that of the custom backward, which must not be a view."""
    mixer = build(MixerSpec.parse("relu_attention frame=bare"), Host(8, 2, (3, 4), 0, 2))
    grads = []
    for write in (lambda y: y.add_(1).mul_(2), lambda y: (y + 1) * 2):
        x = draw(mixer, 2)[0].requires_grad_()
        with use_path("pointwise"):
            write(mixer(x)).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("row", ROWS)
def test_rows_without_gradients(row: str) -> None:
    """What only inference has: the fused linear, kept expansions (twice: made, then kept), buffers reused."""
    spec = MixerSpec.parse(row).at_block(1)
    mixer = build(spec, Host(32, 2, (4, 3), 1, 2), dtype=torch.float32).eval()
    x = draw(mixer, 2)[0].float()
    with torch.no_grad():
        with use_path("reference"):
            defined = mixer(x)
        for path in (*FASTER, *FASTER):
            with suppress(PathError), use_path(path):
                y = mixer(x)
                error = float((y - defined).abs().max() / (1 + defined.abs().max()))
                assert error < 1e-5, f"{path}: output differs by {error:.1e}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("row", ROWS)
def test_rows_in_float64(row: str, training: bool) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    mixer = build(spec, Host(32, 2, (3, 2), 1, 2)).train(training)
    x, upstream = draw(mixer, 2)
    defined = run(mixer, "reference", x, upstream)
    for path, done in serving(mixer, x, upstream):
        error, where = worst(done, defined)
        assert error < 1e-9, f"{path}: {where} differs by {error:.1e}"


@pytest.mark.parametrize("row", [row for row in ROWS if row != "ffn"])
def test_rows_in_float32(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    mixer = build(spec, Host(32, 2, (4, 3), 1, 2), dtype=torch.float32)
    x, upstream = draw(mixer, 2)
    x, upstream = x.float(), upstream.float()
    defined = run(mixer.eval(), "reference", x, upstream)
    for path, done in serving(mixer, x, upstream):
        error, where = worst(done, defined)
        assert error < 1e-4, f"{path}: {where} differs by {error:.1e}"


@pytest.mark.parametrize("row", [row for row in ROWS if row != "ffn"])
def test_rows_in_bfloat16(row: str) -> None:
    """At most twice the error of the definition itself run in bfloat16, both against float64."""
    spec, host = MixerSpec.parse(row).at_block(1), Host(32, 2, (4, 3), 1, 2)
    mixer = build(spec, host, dtype=torch.bfloat16).eval()
    exact = build(spec, host).eval()
    exact.load_state_dict({name: t.double() for name, t in mixer.state_dict().items()})
    x, upstream = (t.bfloat16() for t in draw(mixer, 2))
    truth = run(exact, "reference", x.double(), upstream.double())["output"]
    defined = run(mixer, "reference", x, upstream)["output"]
    for path, done in serving(mixer, x, upstream):
        y = done["output"]
        assert y.dtype == torch.bfloat16
        ours, theirs = (float((t.double() - truth).abs().mean()) for t in (y, defined))
        assert ours <= 2 * theirs + 1e-6, path


@pytest.mark.parametrize("row", ROWS)
def test_autocast_keeps_the_dtype_and_the_value(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    mixer = build(spec, Host(32, 2, (4, 3), 1, 2), dtype=torch.float32).eval()
    x = draw(mixer, 2)[0].float()
    expected = mixer(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = mixer(x)
    if y.requires_grad:
        y.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in mixer.parameters())
    assert float((y.detach().float() - expected.detach()).abs().max() / (1 + expected.detach().abs().max())) < 0.1


@settings(max_examples=60)
@given(specs(), hosts(), st.integers(0, 2**31))
def test_masks_narrow_what_is_seen(spec: MixerSpec, host: Host, seed: int) -> None:
    tokens = host.prefix + host.grid[0] * host.grid[1]
    mixer = build(spec, host, seed).eval()
    x, upstream = draw(mixer, host.batch, seed)
    mask = normal(host.batch, tokens, tokens, seed=seed) < 0.5
    try:
        defined = run(mixer, "reference", x, upstream, mask)
    except ValueError as refused:
        assert "attn_mask" in str(refused)
        return
    for path, done in serving(mixer, x, upstream, mask):
        error, where = worst(done, defined)
        assert error < 1e-9, f"{path}: {where} differs by {error:.1e}"
