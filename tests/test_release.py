"""A tagged commit has the version of its tag, and its section of the changelog."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import kernelbank

ROOT = Path(__file__).parents[1]


def faults(tags: list[str], version: str, changelog: str) -> list[str]:
    """What is wrong with the tags of a commit."""
    releases = [tag for tag in tags if re.fullmatch(r"v\d.*", tag)]
    wrong = [f"the tag {tag} is not v{version}" for tag in releases if tag != f"v{version}"]
    if releases and not re.search(rf"^## {re.escape(version)}(?! \(unreleased\))", changelog, re.MULTILINE):
        wrong.append(f"the changelog has no released {version}")
    return wrong


def test_the_tags_of_this_commit() -> None:
    found = subprocess.run(["git", "tag", "--points-at"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not faults(found.stdout.split(), kernelbank.__version__, (ROOT / "CHANGELOG.md").read_text())


def test_the_changelog_names_the_version() -> None:
    assert re.search(rf"^## {re.escape(kernelbank.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("tags", "changelog", "count"),
    [
        ([], "## 1.0.0 (unreleased)", 0),
        (["v1.0.0", "latest"], "## 1.0.0", 0),
        (["v1.0.0"], "## 1.0.0 (unreleased)", 1),
        (["v1.0.1"], "## 1.0.0", 1),
    ],
)
def test_faults_are_found(tags: list[str], changelog: str, count: int) -> None:
    assert len(faults(tags, "1.0.0", changelog)) == count
