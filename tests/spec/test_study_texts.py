"""How the specs of the studies print."""

from __future__ import annotations

import pytest

from kernelbank.spec import MixerSpec
from kernelbank.spec.text import words
from kernelbank.studies.catalogue import STUDIES


@pytest.mark.parametrize("study", STUDIES)
def test_the_specs_of_the_studies_print_as_the_row_they_name(study: str) -> None:
    """Another row is named only where fewer cells differ from it, or where its activation has the same steps."""
    texts = {text for row in STUDIES[study]().rows for mixer in row.mixers.values() for text in mixer.split("|")}
    for text in texts:
        spec, typed = MixerSpec.parse(text), words(text)[0]
        printed = words(str(spec))[0]
        cells = {row: len(spec.diff(MixerSpec.parse(row))) for row in (printed, typed)}
        same_steps = printed == "layernorm_attention" and "layernorm@positions,count" in text
        assert printed == typed or cells[printed] < cells[typed] or same_steps
