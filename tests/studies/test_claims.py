"""The claims as data: their rows exist, and are what the claims say of them."""

from __future__ import annotations

import pytest

from kernelbank.atlas import ROWS
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.claims import (
    CLAIMS,
    IN_WINDOWS,
    TESTS,
)
from kernelbank.studies.measures import (
    MEASURES,
)
from kernelbank.studies.verdicts import HYPOTHESES

EXPECTED_ROWS = {
    "identity-raw": "activation=identity", "relu-raw": "activation=relu", "exp-raw": "activation=exp",
    "softmax-absolute": "vit activation=softmax, absolute positions in the trunk",
    "relu-absolute": "vit activation=relu,count, absolute positions in the trunk",
    "layernorm-absolute": "vit activation=layernorm,count, absolute positions in the trunk",
    "softmax-colder": "activation=softmax(0.25)", "softmax-warmer": "activation=softmax(4)",
    "dwsa-untied": "dwsa, a positional table per channel", "dwsa-window-untied": "dwsa_window, the same",
}  # fmt: skip
"""The rows that claims name and no study of the catalogue has yet, with the mixer that they are to have."""


def test_every_row_of_a_claim_exists_or_is_expected() -> None:
    for item in CLAIMS:
        study = STUDIES[item.study]()
        labels = {row.label for row in study.rows}
        for part in item.parts:
            assert sum(part.contrast.weights.values()) == pytest.approx(0.0)
            for contrast in (part.contrast, part.contrast.in_windows()):
                for row in contrast.weights:
                    assert (row in labels) != (row in EXPECTED_ROWS), (item.id, row)


def test_rows_have_the_cells_that_their_claims_speak_of() -> None:
    expected = {"relu": "relu,count", "layernorm": "layernorm,count", "batchnorm": "batchnorm,count",
                "softmax-positions": "softmax@positions", "relu-l1": "relu,l1"}  # fmt: skip
    study = STUDIES["softmax"]()
    for row, activation in expected.items():
        for model in study.models:
            stages = study.model(model, study.row(row)).stages
            assert {stage.mixer.text["activation"] for stage in stages} == {activation}
    for windowed in IN_WINDOWS.values():
        assert windowed in EXPECTED_ROWS or "window" in STUDIES["depthwise"]().row(windowed).mixers["hierarchical"]


def test_claims_are_distinct_and_name_their_tests() -> None:
    assert len({item.id for item in CLAIMS}) == len(CLAIMS) >= 8
    assert {part.test for item in CLAIMS for part in item.parts} == set(TESTS) == set(HYPOTHESES)
    assert {part.measure.name for item in CLAIMS for part in item.parts} == set(MEASURES)
    assert all(item.favours and item.paper and item.statement.endswith(".") for item in CLAIMS)
    assert not any(item.id in ROWS for item in CLAIMS)
