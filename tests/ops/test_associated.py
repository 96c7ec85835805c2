"""The closed forms of normalisers where they are hard: means far above deviations, and terms that cancel."""

from __future__ import annotations

import pytest
import torch

from kernelbank import Mixer, MixerSpec, use_path
from kernelbank.ops.context import Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.paths import associated
from kernelbank.ops.paths.toeplitz import dense, row_moments
from kernelbank.ops.position import matrix

GRID = (6, 5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_row_moments_are_those_of_the_matrix(prefix: int) -> None:
    spec = MixerSpec.parse("layernorm_attention")
    p = {"table.weight": 100 + torch.randn(3, 13, 11), "table.prefix": 100 + torch.randn(3, 3)}
    P = matrix(p, geometry(spec, GRID, prefix)).double()
    squares, about = row_moments(p["table.weight"], p["table.prefix"], GRID, prefix)
    assert torch.allclose(squares.double(), (P**2).sum(-1), rtol=1e-6)
    assert torch.allclose(about.double(), ((P - P.mean(-1, keepdim=True)) ** 2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("row", ["layernorm_attention", "layernorm_attention activation=rmsnorm,count"])
def test_a_mean_far_above_the_deviation_costs_no_digits(row: str) -> None:
    """Every key shares a large part, so that a score's mean is 1e3 times its deviation: E[s^2] - mu^2 would lose six
    digits, centred keys lose none."""
    mixer = Mixer(row, 32, 2, GRID).eval()
    with torch.no_grad():
        mixer.key.bias.fill_(300.0)
        x = torch.randn(2, 30, 32)
        with use_path("reference"):
            defined = mixer.double()(x.double())
        mixer.float()
        errors = {}
        for path in ("moments", "vectorised"):
            with use_path(path):
                errors[path] = float((mixer(x) - defined).abs().max() / defined.abs().max())
    assert errors["moments"] < 1e-4 or errors["moments"] < 3 * errors["vectorised"]


def test_rows_whose_terms_cancel_are_summed_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query's position undoes its keys: s = q k + p is 1e-3 where both are 30. The guard finds that row, and
    without it the sum of squares is wrong."""
    spec = MixerSpec.parse("layernorm_attention activation=l2")
    geo = geometry(spec, GRID, 0)
    s = Context(spec, 1, 1, geo, position=dense)
    p = {"table.weight": 30 * torch.randn(1, 11, 9)}
    row, tiny = 7, 1e-3 * torch.randn(30)
    key = (tiny - matrix(p, geo)[0, row]).view(1, 1, 30, 1)
    q = torch.randn(1, 1, 30, 1)
    q[0, 0, row] = 1
    exact = ((q.double() @ key.double().mT + matrix(p, geo).double()) ** 2).sum(-1, keepdim=True)
    found = associated._sum_of_squares(q, key, p, s, 1.0, False)
    assert torch.allclose(found.double(), exact, rtol=1e-3)
    monkeypatch.setattr(associated, "_with_exact_rows", lambda total, *_: total)
    unguarded = associated._sum_of_squares(q, key, p, s, 1.0, False)
    assert not torch.allclose(unguarded.double(), exact, rtol=1e-3)
