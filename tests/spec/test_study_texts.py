"""How the specs of the studies print."""

from __future__ import annotations

import pytest

from kernelbank.atlas import ROWS
from kernelbank.spec import MixerSpec
from kernelbank.spec.text import words
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.study import changed, named_host

HOSTS = DESIGNS["digits"].hosts


@pytest.mark.parametrize("model", HOSTS)
@pytest.mark.parametrize("study", STUDIES)
def test_the_specs_of_the_studies_print_as_the_row_they_name(study: str, model: str) -> None:
    """Another row is named only where fewer cells differ from it, or where its activation has the same steps."""
    host = named_host(model, HOSTS[model])
    for row in STUDIES[study]().rows:
        for stage, before in zip(changed(host, row).stages, host.stages, strict=True):
            spec, (first, *_) = stage.mixer, words(row.cells)
            named = first if first in ROWS else words(str(before.mixer))[0]
            printed = words(str(spec))[0]
            cells = {name: len(spec.diff(MixerSpec.parse(name))) for name in (printed, named)}
            same_steps = printed == "layernorm_attention" and "layernorm@positions,count" in row.cells
            assert printed == named or cells[printed] < cells[named] or same_steps
            assert MixerSpec.parse(str(spec)) == spec
