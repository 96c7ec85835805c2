"""The documentation of `explain` does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()


def test_the_snippet_runs_and_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "explain.md", "exec"), {})
    comments = re.findall(r"^print\(.*\)\s+# (.*)$", snippet, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == comments and len(comments) == 4


def test_its_pictures_are_small() -> None:
    pictures = list((Path(__file__).parents[2] / "docs" / "explain").glob("*.jpg"))
    assert len(pictures) == 5 and all(path.stat().st_size < 250_000 for path in pictures)
