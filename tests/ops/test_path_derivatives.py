"""Derivatives of every path, forced or planned: right, or an error that says why. Never zero or a part in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from equality import build, draw
from strategies import Host
from test_derivatives import TEXTS
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

from kernelbank import Mixer, use_path
from kernelbank.ops import statistics
from kernelbank.ops.context import Call, Context
from kernelbank.ops.machine import Machine, machine
from kernelbank.ops.paths import LINEAR_PATHS, MIXER_PATHS, POSITION_PATHS, PathError, pointwise, shifts, windows
from kernelbank.ops.plan import planned_linear
from kernelbank.spec import MixerSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
CALL = Call(dtype=torch.float64, grad=True)
HOST = Host(dim=32, num_heads=2, grid=(3, 4), prefix=1, batch=2)


def small(name: str) -> Mixer:
    return build(MixerSpec.parse(TEXTS[name]).at_block(1), HOST).eval()


def fast_paths(mixer: Mixer) -> list[str]:
    """Every path but the definition that supports the mixer with gradients."""
    s = Context(mixer.spec, mixer.dim, mixer.num_heads, mixer.geometry)
    paths = {**MIXER_PATHS, **POSITION_PATHS}
    names = [name for name, path in paths.items() if path.unsupported(s, CALL, machine()) is None]
    uses = any(MIXER_PATHS[n].uses_position(s) for n in names if n in MIXER_PATHS and n != "reference")
    return [name for name in names if name != "reference" and (name in MIXER_PATHS or uses)] + ["conv1x1"]


@contextmanager
def honest(name: str) -> Iterator[None]:
    """A path may raise: it does not support transforms, or torch does not (its fused attention, its FFTs)."""
    try:
        yield
    except PathError as error:
        assert "transform" in str(error), error
    except (RuntimeError, NotImplementedError) as error:
        assert "scaled_dot_product" in str(error), (name, error)


def near(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7 * (1 + float(theirs.detach().abs().max())))


def second_derivatives(mixer: Mixer, x: Tensor, direction: Tensor) -> list[Tensor]:
    """The product of the Hessian of sum y^3 with a direction of the tokens, for the tokens and every parameter."""
    tokens = x.clone().requires_grad_()
    inputs = [tokens, *mixer.parameters()]
    (first,) = torch.autograd.grad((tokens + mixer(tokens)).pow(3).sum(), tokens, create_graph=True)
    grads = torch.autograd.grad((first * direction).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


@pytest.mark.parametrize("name", TEXTS)
def test_second_derivatives_of_every_path(name: str) -> None:
    mixer = small(name)
    x, direction = draw(mixer, 2)
    with use_path("vectorised", "linear"):
        expected = second_derivatives(mixer, x, direction)
    for path in fast_paths(mixer):
        with honest(path), use_path(path):
            for ours, theirs in zip(second_derivatives(mixer, x, direction), expected, strict=True):
                assert near(ours, theirs), path


@pytest.mark.parametrize("name", TEXTS)
def test_forward_mode_of_every_path_equals_finite_differences(name: str) -> None:
    mixer = small(name)
    x, tangent = draw(mixer, 2)
    step = 1e-5

    def forward(tokens: Tensor) -> Tensor:
        with use_path("vectorised", "linear"):
            return mixer(tokens)

    with torch.no_grad():
        expected = (forward(x + step * tangent) - forward(x - step * tangent)) / (2 * step)
    moved = func.jvp(mixer, (x,), (tangent,))[1]  # by the plan
    assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-6 * (1 + float(expected.abs().max())))
    assert bool(moved.any())
    for path in fast_paths(mixer):
        with honest(path), use_path(path):
            assert near(func.jvp(mixer, (x,), (tangent,))[1], moved), path


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", TEXTS)
def test_per_sample_gradients_of_every_path_equal_a_loop(name: str) -> None:
    mixer = small(name)
    x, _ = draw(mixer, 2)
    parameters = dict(mixer.named_parameters())
    if not parameters:
        pytest.skip("no parameters")

    def loss(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return func.functional_call(mixer, p, (one[None],)).square().sum()

    loop = [torch.autograd.grad(mixer(x[i : i + 1]).square().sum(), list(parameters.values())) for i in range(2)]
    for path in fast_paths(mixer):
        with honest(path), use_path(path):
            each = func.vmap(func.grad(loss), (None, 0))(parameters, x)
            for i in range(2):
                assert all(near(each[key][i], g) for key, g in zip(parameters, loop[i], strict=True)), path


@pytest.mark.parametrize(
    "name", ["relu_attention", "involution", "swin", "dwsa_window", "layernorm_attention", "dconv"]
)
def test_jacobians_and_hessians_of_torch_func(name: str) -> None:
    """Nested transforms: forward over reverse, and vmap of both."""
    mixer = build(MixerSpec.parse(TEXTS[name]).at_block(1), Host(16, 2, (2, 2), 0, 1)).eval()
    x, _ = draw(mixer, 1)
    hessian = func.hessian(lambda tokens: mixer(tokens).pow(3).sum())(x).reshape(x.numel(), x.numel())
    expected = torch.autograd.functional.hessian(lambda tokens: _vectorised(mixer, tokens).pow(3).sum(), x)
    assert near(hessian, expected.reshape(x.numel(), x.numel()))
    forward, reverse = func.jacfwd(mixer)(x), func.jacrev(mixer)(x)
    assert near(forward, reverse) and bool(forward.any())


def _vectorised(mixer: Mixer, tokens: Tensor) -> Tensor:
    with use_path("vectorised"):
        return mixer(tokens)


# ---- functions of autograd -------------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", pointwise.NON_LINEARITIES)
@pytest.mark.parametrize("added", [True, False])
def test_the_weighted_function(name: str, added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "CHUNK", 8)
    monkeypatch.setattr(pointwise, "SMALL", 8)
    factors = pointwise.Factors(0.7, -0.3)
    inputs = (numbers(2, 2, 3, 2), numbers(2, 2, 4, 2), numbers(2, 2, 4, 2), numbers(2, 3, 4) if added else None)
    check(lambda *t: pointwise._Weighted.apply(*t, factors, name)[0], inputs)


def test_the_shifted_function() -> None:
    check(lambda x, w: shifts._Shifted.apply(x, w, 3), (numbers(1, 2, 1, 4, 5), numbers(1, 2, 9, 2, 3)))


def test_the_reordered_function() -> None:
    order = torch.tensor([2, 0, 3, 1])
    check(lambda rows: windows._Reordered.apply(rows, order, order.argsort()).pow(2), (numbers(4, 2),))


def test_the_sum_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same tensors: the sum is 2 x, and so is that of the gradients."""

    def all_reduce(tensor: Tensor) -> None:
        with torch.no_grad():  # autograd does not see what other processes add
            tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    check(lambda x: statistics._Sum.apply(x).pow(3), (numbers(3),), forward=True)


def check(function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], forward: bool = False) -> None:
    """First and second derivatives against finite differences; a batch of gradients at once, where torch checks it."""
    assert gradcheck(function, inputs, check_batched_grad=not forward, check_forward_ad=forward)
    assert gradgradcheck(function, inputs)


def test_inputs_that_are_computed_from_each_other_are_apart() -> None:
    """q is computed from k: the gradient of q is not counted again in that of k."""
    k, value = numbers(1, 1, 3, 2), numbers(1, 1, 3, 2)

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        o = attend(k * 2, k, value)
        (first,) = torch.autograd.grad(o.pow(3).sum(), k, create_graph=True)
        return torch.autograd.grad(first.square().sum(), k)[0]

    factors = pointwise.Factors(0.7, 1.0)
    ours = run(lambda q, key, v: pointwise._Weighted.apply(q, key, v, None, factors, "sigmoid")[0])
    assert near(ours, run(lambda q, key, v: torch.sigmoid(q @ key.mT * 0.7) @ v))


# ---- linear layers ---------------------------------------------------------------------------------------


def test_a_linear_layer_under_forward_mode_is_never_the_fused_one() -> None:
    """oneDNN's fused linear drops tangents in silence: neither the plan nor a forced path runs it."""
    weight, bias, x, tangent = torch.randn(8, 4), torch.randn(8), torch.randn(64, 4), torch.randn(64, 4)
    with torch.no_grad():
        moved = func.jvp(lambda t: planned_linear(t, weight, bias), (x,), (tangent,))[1]
        assert torch.allclose(moved, tangent @ weight.T, atol=1e-5)
        each = func.vmap(lambda t: planned_linear(t, weight, bias, gelu=True))(x[:, None])
        assert torch.allclose(each[:, 0], torch.nn.functional.gelu(x @ weight.T + bias), atol=1e-5)
        fused = Machine("cpu", 2, True, True, {"mkldnn": (2.0, 2.0)})
        assert LINEAR_PATHS["mkldnn"].unsupported(Call(), fused) is None
        assert LINEAR_PATHS["mkldnn"].unsupported(Call(transformed=True), fused) == "it has no derivative"
        if LINEAR_PATHS["mkldnn"].unsupported(Call(), machine()) is None:
            with use_path("mkldnn"), pytest.raises(PathError, match="does not"):
                func.jvp(lambda t: planned_linear(t, weight, bias), (x,), (tangent,))
