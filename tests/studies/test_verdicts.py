"""Claims decided on runs: small examples computed by hand, and simulated runs whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.simulated import CODE, DATA, MACHINE, RELU, claim, drawn, pairs, the, trained

from kernelbank.studies.claims import (
    ACCURACY,
    AREA,
    CLAIMS,
    EPOCHS,
    MACS,
    PARAMS,
    TIME,
    ClaimPart,
    TestKind,
    factor,
    interaction,
    versus,
)
from kernelbank.studies.trained_run import TrainedRun
from kernelbank.studies.verdicts import decide, every, image_error, some

# ---- decisions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "test", "decision"),
    [
        ([2.0, 2.1, 1.9], "superiority", "holds"),
        ([0.1, 0.12, 0.09], "superiority", "holds"),
        ([0.1, -0.1, 0.05], "superiority", "does not hold"),  # a gain of a point is ruled out
        ([-2.0, -2.1, -1.9], "superiority", "does not hold"),
        ([2.0, -1.0, 1.0], "superiority", "undecided"),
        ([-0.5, -0.55, -0.45], "non-inferiority", "holds"),
        ([-2.0, -2.1, -1.9], "non-inferiority", "does not hold"),
        ([-1.0, -1.2, -0.8], "non-inferiority", "undecided"),
        ([0.5, 0.4, 0.6], "equivalence", "holds"),
        ([3.0, 3.1, 2.9], "equivalence", "does not hold"),
        ([-3.0, -3.1, -2.9], "equivalence", "does not hold"),
        ([0.9, 0.5, 1.5], "equivalence", "undecided"),
        ([5.0], "superiority", "undecided"),
    ],
)
def test_decisions(gains: list[float], test: TestKind, decision: str) -> None:
    finding = the(pairs(gains), test=test)
    assert finding.decision == decision and finding.effect == pytest.approx(sum(gains) / len(gains))
    assert (finding.low is None) == (len(gains) == 1)


def test_fewer_epochs_are_better() -> None:
    slow = [trained("softmax", seed, (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0)) for seed in range(6)]
    fast = [trained("relu", seed, (80.0,) * 8) for seed in range(4)]
    finding = the(slow + fast, EPOCHS)
    assert (finding.effect, finding.decision) == (-7.0, "holds")
    assert the(slow + fast, AREA).effect == pytest.approx(35.0)


def test_relative_measures_are_in_per_cent() -> None:
    runs = pairs([0.0, 0.0, 0.0], params=900, macs=1100, seconds=0.5)
    assert the(runs, PARAMS).effect == pytest.approx(-10.0) and the(runs, PARAMS).decision == "holds"
    assert the(runs, MACS).effect == pytest.approx(10.0) and the(runs, MACS).decision == "does not hold"
    assert the(runs, TIME).effect == pytest.approx(-50.0) and the(runs, TIME).decision == "holds"
    elsewhere = pairs([0.0, 0.0], machine=replace(MACHINE, cpu="another"))
    assert "different machines" in the(elsewhere, TIME).reason


def test_a_diverged_run_counts_and_is_named() -> None:
    runs = pairs([2.0, 2.0, 2.0])
    runs[-1] = trained("relu", 2, (40.0,), failure="nan", epochs=3)
    finding = the(runs)
    assert finding.effect == pytest.approx((2 + 2 - 70) / 3) and finding.decision == "undecided"
    assert finding.diverged == (("relu", 1),)


def test_unfinished_runs_and_unpaired_seeds_are_not_used() -> None:
    runs = [*pairs([2.0, 2.1, 1.9]), trained("relu", 3, (99.0,)), trained("layernorm", 7)]
    runs.append(trained("softmax", 4, (50.0,), epochs=3))
    assert the(runs).seeds == (0, 1, 2)
    nothing = [trained("relu", 1), trained("softmax", 2), trained("layernorm", 2)]
    assert the(nothing).reason == "missing seeds: none is common to the rows relu, softmax"


def test_a_small_split_decides_nothing() -> None:
    digits = replace(DATA, test=360)
    runs = [replace(run, data=digits) for run in pairs([2.0, 2.1, 1.9])]
    finding = the(runs)
    assert finding.decision == "undecided" and "360 images cannot decide it" in finding.reason
    assert finding.low is not None and finding.low > 0  # what the seeds say stays visible
    assert image_error(runs, 360) == pytest.approx(100 * math.sqrt(2 * 0.81 * 0.19 / 360))


def test_an_effect_below_the_margin_is_called_small() -> None:
    finding = the(pairs([0.1, 0.12, 0.09]))
    assert finding.decision == "holds"
    assert finding.remarks == ("shown, and shown to be less than the margin of 1 point",)
    assert the(pairs([2.0, 2.1, 1.9])).remarks == ()


def test_runs_of_several_states_of_the_code_are_remarked_and_not_timed() -> None:
    other = [replace(run, code=replace(CODE, sources="d" * 64)) for run in pairs([2.0, 2.1, 1.9])[3:]]
    runs = pairs([2.0, 2.1, 1.9])[:3] + other
    assert the(runs).decision == "holds" and the(runs).remarks == ("the runs were made by 2 states of the code",)
    assert "by different code" in the(runs, TIME).reason


def test_two_runs_of_one_seed_are_in_conflict() -> None:
    """Two models under one label: neither is taken in silence."""
    runs = pairs([2.0, 2.1, 1.9])
    finding = the([*runs, replace(runs[-1], mixer="vit activation=relu", file="other.json")])
    assert finding.decision == "not evaluated"
    assert finding.reason == f"conflicting runs: row relu has two runs of seed 2: {runs[-1].file}, other.json"
    counted = [*pairs([0.0]), *(replace(run, seed=1, params=7) for run in pairs([0.0])[1:]), trained("softmax", 1)]
    assert the(counted, PARAMS).reason == "conflicting runs: seeds of the same row differ in parameters"


def test_seeds_without_a_partner_are_remarked() -> None:
    finding = the([*pairs([2.0, 2.1, 1.9]), trained("relu", 3, (99.0,)), trained("relu", 4, (99.0,)), trained("l1", 3)])
    assert finding.seeds == (0, 1, 2)
    assert finding.remarks == ("seeds of relu that another row lacks were left out: 3, 4",)


def test_what_is_missing_is_named() -> None:
    verdicts = {verdict.claim.id: verdict for verdict in decide(pairs([0.0, 0.0]))}
    assert verdicts["C2"].decision == "not evaluated"
    assert verdicts["C2"].missing[0] == "rows: batchnorm (plain)"
    assert verdicts["C5"].missing == ("runs of study depthwise",)
    assert verdicts["C4"].findings[0].decision != "not evaluated"
    assert [verdict.claim.id for verdict in decide([])] == [item.id for item in CLAIMS]
    unfinished = decide([trained("relu", 0, (1.0,), epochs=3)])[0]
    assert unfinished.missing == ("finished runs of study softmax",)


def test_claims_need_all_parts_or_any() -> None:
    runs = pairs([2.0, 2.1, 1.9]) + [trained("l1", seed, (60.0 + seed / 10,)) for seed in range(3)]
    parts = ClaimPart(RELU, ACCURACY, "superiority"), ClaimPart(versus("l1", "softmax"), ACCURACY, "superiority")
    assert decide(runs, [claim(*parts)])[0].decision == "does not hold"
    assert decide(runs, [claim(*parts, needs="any")])[0].decision == "holds"
    assert every(["holds", "undecided"]) == "undecided" and every(["holds", "not evaluated"]) == "not evaluated"
    assert some(["does not hold", "undecided"]) == "undecided" and some(["does not hold"]) == "does not hold"
    # a model in which it fails decides the claim
    worse = [replace(run, model="other") for run in pairs([-3.0, -3.1, -2.9])]
    assert decide(runs + worse, [claim(parts[0])])[0].decision == "does not hold"


def test_windows_in_hierarchical_trunks() -> None:
    runs = [trained(row, seed, (80.0,), study="depthwise", windowed=True)
            for row in ("dwsa", "dwsa-window", "softmax") for seed in (0, 1)]  # fmt: skip
    (verdict,) = decide(runs, [claim(ClaimPart(versus("dwsa", "softmax"), ACCURACY, "superiority"), study="depthwise")])
    assert verdict.findings[0].contrast.label == "dwsa-window − softmax"
    assert any("dwsa-window" in file for file in verdict.findings[0].runs)


def test_contrasts() -> None:
    assert dict(factor("f", (("a", "b"), ("c", "b"))).weights) == {"a": 0.5, "b": -1.0, "c": 0.5}
    assert dict(interaction("relu", "softmax", "absolute").weights) == {
        "relu": 1.0, "softmax": -1.0, "relu-absolute": -1.0, "softmax-absolute": 1.0,
    }  # fmt: skip
    runs = [trained(row, seed, (value,)) for seed in (0, 1)
            for row, value in {"a": 80.0, "b": 70.0, "c": 90.0}.items()]  # fmt: skip
    (verdict,) = decide(runs, [claim(ClaimPart(factor("f", (("a", "b"), ("c", "b"))), ACCURACY, "superiority"))])
    assert verdict.findings[0].effect == pytest.approx(15.0)


# ---- truth known ----------------------------------------------------------------------------------------


def rate(gain: float, test: TestKind, decision: str, *, seeds: int = 5, times: int = 600) -> float:
    """How often ReLU with a true gain is decided so, in simulated studies of a spread of 0.3 points."""
    random = np.random.default_rng(0)
    rows = {"softmax": 80.0, "relu": 80.0 + gain}
    return sum(the(drawn(rows, seeds, 0.3, random), test=test).decision == decision for _ in range(times)) / times


@pytest.mark.parametrize(
    ("gain", "test", "wrong"),
    [
        (0.0, "superiority", "holds"),
        (-1.0, "non-inferiority", "holds"),
        (-1.0, "non-inferiority", "does not hold"),
        (1.0, "equivalence", "holds"),
        (-1.0, "equivalence", "does not hold"),
    ],
)
def test_at_the_edge_of_a_claim_false_decisions_are_rare(gain: float, test: TestKind, wrong: str) -> None:
    """2.5 % at most, four standard errors of 600 draws allowed; and not never, or the test would not be that test."""
    found = rate(gain, test, wrong)
    assert 0.003 < found <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 600)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_the_true_effect_in_95_per_cent_of_studies(seeds: int) -> None:
    """A true effect of 0.7 points and a spread of 0.3 points for each run, 1,000 studies, four standard errors."""
    random = np.random.default_rng(3)
    found = [the(drawn({"softmax": 80.0, "relu": 80.7}, seeds, 0.3, random)) for _ in range(1000)]
    covered = sum((item.low or 0.0) <= 0.7 <= (item.high or 0.0) for item in found) / 1000
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 1000))


@pytest.mark.parametrize(
    ("gain", "test", "right"),
    [
        (1.5, "superiority", "holds"),
        (-0.2, "superiority", "does not hold"),
        (0.2, "non-inferiority", "holds"),
        (-2.5, "non-inferiority", "does not hold"),
        (0.0, "equivalence", "holds"),
        (2.5, "equivalence", "does not hold"),
    ],
)
def test_an_effect_of_size_is_found(gain: float, test: TestKind, right: str) -> None:
    """Five seeds with a spread of 0.3 points find an effect of more than a point nearly always."""
    assert rate(gain, test, right, times=200) > 0.85


def test_holm_keeps_the_family_at_its_level() -> None:
    """Twelve true null hypotheses: without correction more than 20 % of studies would find something."""
    random = np.random.default_rng(1)
    rows = {"softmax": 80.0} | {f"row{i}": 80.0 for i in range(12)}
    many = claim(*(ClaimPart(versus(f"row{i}", "softmax"), ACCURACY, "superiority") for i in range(12)))
    runs = [decide(drawn(rows, 4, 0.3, random), [many])[0] for _ in range(300)]
    wrong = sum(any(finding.decision == "holds" for finding in verdict.findings) for verdict in runs) / 300
    assert wrong <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 300)


def test_pairing_by_seed_removes_what_rows_share() -> None:
    """The seeds' own spread of a point is no part of the interval."""
    random = np.random.default_rng(2)
    finding = the(drawn({"softmax": 80.0, "relu": 80.5}, 20, 0.1, random))
    assert finding.low is not None and finding.high is not None and finding.high - finding.low < 0.3


@given(st.permutations(pairs([2.0, 2.1, 1.9])))
def test_the_order_of_runs_does_not_matter(runs: list[TrainedRun]) -> None:
    finding = the(runs)
    assert (finding.decision, finding.seeds) == ("holds", (0, 1, 2)) and finding.effect == pytest.approx(2.0)
