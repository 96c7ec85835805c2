"""The README does what it says: its snippet runs, its error line is the real one, its commands are two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kernelbank import MixerSpec, SpecError
from kernelbank.atlas import ROWS
from kernelbank.cli import VERBS
from kernelbank.studies.catalogue import STUDIES

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


@pytest.mark.parametrize("snippet", blocks("python"), ids=["a spec", "models", "speed"])
def test_the_snippets_run_and_print_what_their_comments_say(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    comments = re.findall(r"^print\(.*\)\s+# (.*)$", snippet, re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(comments) >= 2
    assert all(comment.startswith(line) for line, comment in zip(printed, comments, strict=True))
    assert names.get("y", torch.empty(2, 196, 96)).shape == (2, 196, 96)


def test_the_error_line_is_the_real_one() -> None:
    command, line = next(block for block in blocks("") if block.startswith("$ kernelbank atlas")).splitlines()
    text = re.search(r'"(.*)"', command).group(1)
    with pytest.raises(SpecError) as caught:
        MixerSpec.parse(text)
    assert line == f"kernelbank: error: {caught.value}"


def test_two_commands_set_themselves_up() -> None:
    commands = [block for block in blocks("") if "venv" in block]
    assert len(commands) == 2 and all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "study softmax" in commands[0] and "pytest" in commands[1]


def test_every_command_it_names_exists() -> None:
    named = re.findall(r"`kernelbank (\w+)(?: (\w+))?", README)
    assert {verb for verb, _ in named} == VERBS.keys()
    assert {argument for verb, argument in named if verb == "study"} == STUDIES.keys()
    assert f"{len(ROWS)} rows" in README


def test_every_relative_link_exists() -> None:
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_counts_it_states_are_true() -> None:
    from kernelbank.analysis.proofs import PROOFS

    assert f"{len(PROOFS)} identities" in README
