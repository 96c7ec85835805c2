"""The claims as data: their rows exist, and are what the claims say of them."""

from __future__ import annotations

import pytest

from kernelbank.atlas import ROWS
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.claims import CLAIMS, IN_WINDOWS, TESTS
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.measures import MEASURES
from kernelbank.studies.study import changed, named_host
from kernelbank.studies.verdicts import HYPOTHESES

HOSTS = DESIGNS["digits"].hosts
EXPECTED_ROWS = {"dwsa-untied", "dwsa-window-untied"}
"""The rows that claims name and that no spec can state yet: a positional table per channel."""


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
        for model in HOSTS:
            stages = changed(named_host(model, HOSTS[model]), study.row(row)).stages
            assert {stage.mixer.text["activation"] for stage in stages} == {activation}
    for windowed in IN_WINDOWS.values():
        assert windowed in EXPECTED_ROWS or "{window}" in STUDIES["depthwise"]().row(windowed).cells


def test_claims_are_distinct_and_name_their_tests() -> None:
    assert len({item.id for item in CLAIMS}) == len(CLAIMS) >= 8
    assert {part.test for item in CLAIMS for part in item.parts} == set(TESTS) == set(HYPOTHESES)
    assert {part.measure.name for item in CLAIMS for part in item.parts} == set(MEASURES)
    assert all(item.favours and item.paper and item.statement.endswith(".") for item in CLAIMS)
    assert not any(item.id in ROWS for item in CLAIMS)
