"""The examples run as they are: the scripts as a user starts them, the cells of the notebook in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "change_a_cell.py": ("layernorm,count", "%"),
    "dynamic_convnet.py": ("dconv", "M parameters"),
    "kernels_of_two_models.py": ("blocks.5.attn", "effective number"),
    "serve.py": ("within", "of the model"),
}
"""What each script prints, among other things."""


def test_every_script_is_run() -> None:
    assert sorted(PRINTED) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", PRINTED)
def test_a_script(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::FutureWarning:kernelbank", str(EXAMPLES / name)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(words in run.stdout for words in PRINTED[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    names: dict[str, object] = {}
    for cell in cells:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert "relu" in capsys.readouterr().out
