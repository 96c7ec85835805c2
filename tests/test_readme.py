"""The README does what it says: its snippet runs, its tables are those of the atlas and of the records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kernelbank.atlas import ROWS
from kernelbank.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, row by row, without its head."""
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_the_snippet_runs_and_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    comments = re.findall(r"^print\(.*\)\s+# (.*)$", snippet, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == comments and len(comments) == 2
    assert len(snippet.splitlines()) <= 11


def test_two_commands_set_themselves_up() -> None:
    commands = [block for block in blocks("") if "venv" in block]
    assert len(commands) == 2 and all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "study softmax" in commands[0] and "pytest" in commands[1]


def test_every_command_it_names_exists_and_every_verb_is_named() -> None:
    assert set(re.findall(r"`kernelbank (\w+)", README)) == VERBS.keys()
    assert f"{len(ROWS)} rows" in README


def test_the_mixers_of_the_paper_have_the_cells_of_the_atlas() -> None:
    axes = ("bank", "support", "mix", "kernel", "size", "activation", "position")
    rows = table("The mixers of the paper")
    assert len(rows) == 5
    for _, name, *cells in rows:
        assert cells == [ROWS[name.strip("`")].cells[axis] for axis in axes]


def test_the_numbers_of_the_picture_are_recorded() -> None:
    recorded = (ROOT / "records" / "cifar10-softmax" / "table.md").read_text().splitlines()
    (layernorm,) = (line for line in recorded if line.startswith("| layernorm |"))
    (softmax,) = (line for line in recorded if line.startswith("| softmax (baseline) |"))
    (relu,) = (line for line in recorded if line.startswith("| relu |"))
    assert "| 50.7 ± 0.1 | 5 |" in layernorm and "after 5 of 8 epochs" in README and "50.7 ± 0.1" in README
    assert "| 47.3 ± 0.3 | 8 |" in softmax and "47.3 ± 0.3" in README
    assert "| 46.5 ± 1.5 | - |" in relu and "46.5 ± 1.5" in README


def test_the_speeds_are_those_of_the_page_on_performance() -> None:
    measured = (ROOT / "docs" / "performance.md").read_text()
    rows = table("Speed")
    assert len(rows) == 8
    for _, theirs, ours, ratio in rows:
        assert f"| {theirs} / {ours} | {ratio} |" in measured


def test_every_relative_link_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_counts_it_states_are_true() -> None:
    from kernelbank.analysis.proofs import PROOFS

    assert f"{len(PROOFS)} identities" in README
