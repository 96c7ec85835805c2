"""Every identity of the list holds, and the measure of error can fail."""

import pytest
import torch

from kernelbank.analysis import proofs


@pytest.mark.parametrize("name", proofs.PROOFS)
def test_identity_holds(name: str) -> None:
    proof = proofs.prove(name)
    assert proof.holds, f"{proof.statement}: {proof.error:.1e} > {proof.tolerance:.1e}"


def test_an_error_above_the_tolerance_fails() -> None:
    wrong = proofs.error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
    assert not proofs.Proof("x", "1 = 1.1", wrong).holds and not proofs.Proof("x", "nan", float("nan")).holds
