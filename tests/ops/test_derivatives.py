"""Derivatives beyond the first, forward mode, transforms of torch.func and recorded graphs, on every row."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from equality import build, draw, normal
from strategies import Host
from torch import Tensor, func
from torch.autograd import forward_ad

from kernelbank import Mixer, use_path
from kernelbank.atlas import ROWS
from kernelbank.ops.geometry import axis_visibility, geometry, visibility
from kernelbank.ops.machine import Machine, unprobed
from kernelbank.ops.paths import windows
from kernelbank.spec import MixerSpec, Window

HOST = Host(dim=32, num_heads=2, grid=(4, 5), prefix=0, batch=3)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
SMALLER = {"swin": "swin support=window(2, 1)", "dwsa_window": "dwsa_window support=window(2, 1)",
           "involution": "involution kernel=grouped(C/4)"}  # fmt: skip
TEXTS = {row: SMALLER.get(row, row) for row in ROWS}
TEXTS |= {"relu2": "vit activation=relu2,sqrt_count", "prefix": "vit_relpos activation=relu,count",
          "gelu": "vit activation=gelu,count"}  # fmt: skip


def mixer_of(name: str) -> Mixer:
    host = HOST if name != "prefix" else Host(32, 2, (4, 5), 2, 3)
    return build(MixerSpec.parse(TEXTS[name]).at_block(1), host).eval()


@pytest.mark.parametrize("name", TEXTS)
def test_second_derivatives_equal_the_definition(name: str) -> None:
    """A Hessian-vector product through the planned path and through the reference."""
    mixer = mixer_of(name)
    x, direction = draw(mixer, 2)

    def product() -> list[Tensor]:
        tokens = x.clone().requires_grad_()
        inputs = [tokens, *mixer.parameters()]
        first = torch.autograd.grad(mixer(tokens).square().sum(), inputs, create_graph=True, allow_unused=True)
        along = (first[0] * direction).sum()
        second = torch.autograd.grad(along, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, second, strict=True)]

    try:
        planned = product()
    except RuntimeError as error:  # torch's fused attention has no second derivative, and says so
        assert "scaled_dot_product" in str(error)
        with use_path("vectorised"):
            planned = product()
    with use_path("reference"):
        defined = product()
    for ours, theirs in zip(planned, defined, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * (1 + float(theirs.abs().max())))


@pytest.mark.parametrize("name", TEXTS)
def test_forward_mode_equals_the_reverse_mode(name: str) -> None:
    mixer = mixer_of(name)
    x, tangent = draw(mixer, 2)
    y, moved = func.jvp(mixer, (x,), (tangent,))
    upstream = normal(*y.shape, seed=3, dtype=y.dtype)
    tokens = x.clone().requires_grad_()
    (back,) = torch.autograd.grad((mixer(tokens) * upstream).sum(), tokens)
    assert torch.allclose((moved * upstream).sum(), (back * tangent).sum(), rtol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(mixer(forward_ad.make_dual(x, tangent)))
    assert dual.tangent is not None and torch.allclose(dual.tangent, moved, rtol=1e-8)


@pytest.mark.parametrize("name", TEXTS)
def test_per_sample_gradients_equal_a_loop(name: str) -> None:
    mixer = mixer_of(name)
    x, _ = draw(mixer, 3)
    parameters = dict(mixer.named_parameters())
    if not parameters:
        pytest.skip("no parameters")

    def loss(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return func.functional_call(mixer, p, (one[None],)).square().sum()

    each = func.vmap(func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        loop = torch.autograd.grad(mixer(x[i : i + 1]).square().sum(), list(parameters.values()))
        for (key, ours), theirs in zip(each.items(), loop, strict=True):
            assert torch.allclose(ours[i], theirs, rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize("name", TEXTS)
def test_exported_and_traced_mixers_are_right_at_any_batch(name: str) -> None:
    mixer = mixer_of(name)
    x, wider = draw(mixer, 2)[0], draw(mixer, 7, 5)[0]
    exported = torch.export.export(mixer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and shapes become constants
        traced = torch.jit.trace(mixer, (x,), check_trace=False)
        for tokens in (x, wider, wider[:1]):
            defined = mixer(tokens)
            near = 1e-6 * float(defined.abs().max())  # a trace keeps Python numbers in single precision
            assert torch.allclose(traced(tokens), defined, atol=near), len(tokens)
            if len(tokens) > 1:
                assert torch.allclose(exported(tokens), defined, rtol=1e-9), len(tokens)


@pytest.mark.parametrize("text", ["dconv", "condconv", "ddwconv"])
def test_no_image_gives_no_output_on_wide_grids(text: str) -> None:
    assert Mixer(text, 8, 2, (24, 24)).eval()(torch.empty(0, 576, 8)).shape == (0, 576, 8)


def test_a_probe_decides_nothing_in_unprobed() -> None:
    """The linear form of every machine is the same where a run fixes it, and what it computes follows from the run."""
    fast, slow = (Machine("cpu", 2, True, True, {"conv1x1": (g, g), "mkldnn": (g, g)}) for g in (1.5, 0.9))
    mixer = Mixer("vit", 16, 2, (4, 4))
    x, results = torch.randn(2, 16, 16), []
    for machine in (fast, slow):
        with pytest.MonkeyPatch.context() as patch, unprobed():
            patch.setattr("kernelbank.ops.machine.probe", lambda device="cpu", machine=machine: machine)
            patch.setattr("kernelbank.ops.machine._probed", {})
            mixer.zero_grad()
            mixer(x).square().sum().backward()
            results.append([p.grad.clone() for p in mixer.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("grid", "shifted"), [((7, 14), False), ((8, 14), True), ((14, 7), False), ((5, 9), False)])
def test_mmpretrain_shifts_neither_axis_where_a_window_fills_one(grid: tuple[int, int], shifted: bool) -> None:
    """ShiftWindowMSA.forward of mmpretrain sets the shift to 0 where min(H, W) is the window."""
    spec = MixerSpec.parse("swin support=window(7, 3, pad=mmpretrain)")
    geo = geometry(spec, grid, 0)
    plain = geometry(MixerSpec.parse("swin support=window(7, 0, pad=mmpretrain)"), grid, 0)
    assert (geo.visible is None and plain.visible is None) or shifted or torch.equal(geo.visible, plain.visible)
    if shifted:
        assert not torch.equal(geo.visible, plain.visible)


def test_timm_shifts_each_axis_by_itself() -> None:
    visible = visibility(Window(7, 3), (7, 14), 0)
    assert not torch.equal(visible, visibility(Window(7, 0), (7, 14), 0))


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_order_of_an_image_equals_that_of_a_batch(prefix: int) -> None:
    geo = geometry(MixerSpec.parse("swin support=window(3, 1)"), (5, 7), prefix)
    x = torch.randn(3, geo.tokens, 4)
    batch, image = windows.BatchOrder(3, geo), windows.ImageOrder(geo)
    assert torch.equal(batch.from_regions(batch.to_regions(x)), x) and torch.equal(
        image.from_regions(image.to_regions(x)), x
    )
    (parts, first), (others, second) = batch.parts(batch.to_regions(x)), image.parts(image.to_regions(x))
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


@pytest.mark.parametrize(("activation", "gain"), [("relu2,count", 20.0), ("exp,count", 2.0), ("relu,count", 40.0)])
def test_half_precision_does_not_overflow_where_the_plain_path_does_not(activation: str, gain: float) -> None:
    """Scores of hundreds, whose squares are beyond half precision: the scale enters before the square."""
    torch.manual_seed(0)
    mixer = Mixer(f"vit activation={activation}", 64, 1, (14, 14)).eval()
    x = 3 * torch.randn(1, 196, 64)
    with torch.no_grad():
        mixer.q.weight.mul_(gain)
        mixer.key.weight.mul_(gain)
        mixer.value.weight.mul_(0.01)
        found = {}
        for path in ("vectorised", "pointwise"):
            with use_path(path):
                found[path] = mixer.half()(x.half()).float()
    assert bool(found["vectorised"].isfinite().all())
    near = 2e-3 * float(found["vectorised"].abs().max())
    assert torch.allclose(found["pointwise"], found["vectorised"], rtol=5e-3, atol=near)


def test_swapped_parameters_keep_no_expansion() -> None:
    """torch can replace a parameter's tensor in place: nothing of ours refers to it, and what was kept is not used."""
    mixer = Mixer("dwsa", 16, 2, (4, 4)).eval()
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        before = mixer(x)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            moved = mixer.double()(x.double())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.allclose(moved, before.double(), atol=1e-5)


def test_forced_paths_belong_to_a_thread() -> None:
    mixer, found = Mixer("dwsa", 8, 2, (2, 2)), []

    def run() -> None:
        found.append(mixer(torch.randn(1, 4, 8)).shape)

    with use_path("sdpa"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="does not support"):
            run()
    assert found == [(1, 4, 8)]


def test_a_support_with_a_stride_is_seen_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visibility takes sets of positions, not their ends."""
    monkeypatch.setattr("kernelbank.ops.geometry.seen", lambda support, length: (range(0, length, 2),) * length)
    visible = axis_visibility(Window(2, 0), 5, None)
    assert visible.tolist() == [[True, False, True, False, True]] * 5
