"""Every identity of the list holds, and the measure of error can fail."""

from dataclasses import replace

import pytest
import torch

from kernelbank.analysis import proofs
from kernelbank.ops import plan
from kernelbank.ops.context import Context, Params
from kernelbank.ops.paths.path import MixerPath


@pytest.mark.parametrize("name", proofs.PROOFS)
def test_identity_holds(name: str) -> None:
    verdict = proofs.prove(name)
    assert verdict.holds, f"{verdict.statement}: {verdict.error:.1e} > {verdict.tolerance:.1e}"


def test_an_error_above_the_tolerance_fails() -> None:
    wrong = proofs.error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
    assert (
        not proofs.ProofResult("x", "1 = 1.1", wrong).holds and not proofs.ProofResult("x", "nan", float("nan")).holds
    )


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 1e-6])
@pytest.mark.parametrize("name", ["attention is two convolutions", "every row", "size 3", "mean is pool"])
def test_a_broken_path_fails(name: str, spoil: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use of the operator adds an error to one image of whatever path the plan takes."""

    def broken(whole: MixerPath) -> MixerPath:
        def run(x: torch.Tensor, p: Params, s: Context) -> torch.Tensor:
            noise = torch.zeros_like(x)
            noise[0, 0, 0] = spoil * torch.rand(())
            return whole.run(x, p, s) + noise

        return replace(whole, run=run)

    for path, whole in plan.MIXER_PATHS.items():
        if path not in ("conv", "reference"):
            monkeypatch.setitem(plan.MIXER_PATHS, path, broken(whole))
    assert not proofs.prove(name).holds
