from __future__ import annotations

from pathlib import Path

import pytest
from studies.small_study import study


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert study(folder) == 0
    return folder
