"""The documentation does what it says: the blocks of every page run in order, and its links lead somewhere.

A page has one folder and one namespace. ``python`` blocks are executed, and what a comment after a ``print`` promises
must be printed. ``shell`` blocks hold commands of ours. ``console`` blocks also hold their output, which is compared
except for its numbers. A second word behind the language says why a block cannot run here (`MARKS`): its commands are
only parsed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from kernelbank import cli

pytest.importorskip("timm")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^print\(.*\) +# (?!lists )(.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")
NUMBER = re.compile(r"\d+\.\d+(e-?\d+)?")
MARKS = {
    "data": "needs images, published weights or runs that the repository does not hold",
    "gpu": "needs GPUs",
    "cluster": "needs a scheduler or several machines",
    "minutes": "takes minutes",
}
MARKED = {"data": 17, "gpu": 2, "cluster": 4, "minutes": 2}
"""The number of blocks with each mark over all pages. All others run."""


class Block(NamedTuple):
    """A fenced block of a page: its language, the word behind it, and its text."""

    language: str
    mark: str
    text: str


def blocks(page: str) -> list[Block]:
    found = []
    for info, text in FENCE.findall((DOCS / page).read_text()):
        language, _, mark = info.partition(" ")
        found.append(Block(language, mark, text))
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of ours, without the prompt and the launcher before them."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    ours = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?(kernelbank|torchrun|srun) ", line)]
    found = [shlex.split(line, comments=True) for line in ours]
    return [words[words.index("kernelbank") + 1 :] for words in found]


def run(words: list[str], page: str, expected: int = 0) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == expected, f"{page}: kernelbank {shlex.join(words)} ended with {code}"


def test_only_these_languages_and_marks_are_used() -> None:
    used = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in used} <= {"python", "shell", "console", "bash"}
    assert {block.mark for block in used} <= {"", "script", *MARKS}
    assert Counter(block.mark for block in used if block.mark in MARKS) == MARKED
    assert all(block.mark == "cluster" for block in used if block.language == "bash")


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark not in MARKS for block in blocks(page))])
def test_the_blocks_of_a_page_run(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS / "explain" / "boat.jpg", "photo.jpg")
    shutil.copytree(ROOT / "records", "records")
    monkeypatch.setattr(sys, "argv", ["classify.py", "model.onnx", "photo.jpg"])
    names: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks(page)):
            if block.mark in MARKS:
                continue
            if block.language == "python":
                exec(compile(block.text, f"{page}, block {number}", "exec"), names)
                check_promises(page, block, capsys.readouterr().out)
            else:
                assert commands(block.text), f"{page}: block {number} has no command of ours"
                for words in commands(block.text):
                    run(words, page, 2 if "kernelbank: error: " in block.text else 0)
                check_console(page, block, "".join(capsys.readouterr()))


def check_promises(page: str, block: Block, printed: str) -> None:
    for promise in PROMISE.findall(block.text):
        # a promise may go on with an explanation after ": "
        assert promise.split(": ")[0] in printed, f"{page} promises {promise!r}"


def check_console(page: str, block: Block, printed: str) -> None:
    if block.language == "console":
        shown = "".join(line for line in block.text.splitlines(keepends=True) if not line.startswith("$ "))
        assert NUMBER.sub("N", printed) == NUMBER.sub("N", shown), page


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.mark in MARKS for block in blocks(page))])
def test_the_options_of_commands_that_cannot_run_here_exist(page: str) -> None:
    parsed = 0
    for block in blocks(page):
        if block.mark in MARKS and block.language != "python":
            for verb, *words in commands(block.text):
                if not any("$" in word for word in words):
                    import_module(f"kernelbank.commands.{verb}").read(words)
                    parsed += 1
    assert parsed or all(block.language in ("python", "bash") for block in blocks(page) if block.mark in MARKS)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall((DOCS / page).read_text()):
        path = DOCS / target
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor[1:] in anchors(path), f"{page}: {target}{anchor}"


def test_the_identities_that_the_pages_name_exist() -> None:
    from kernelbank.analysis.proofs import PROOFS

    named = re.findall(r"`kernelbank atlas --prove` \| (.+) \|$", (DOCS / "idea.md").read_text(), re.MULTILINE)
    assert len(named) >= 8 and set(named) <= PROOFS.keys()


def test_the_page_on_specs_lists_the_words_of_every_axis() -> None:
    from kernelbank.spec import AXES

    text = (DOCS / "spec.md").read_text()
    for axis in AXES.values():
        (row,) = re.findall(rf"^\| `{axis.name}` .*$", text, re.MULTILINE)
        words = {re.match(r"\w+", axis.show(value))[0] for value in axis.examples}
        if axis.name not in ("size", "activation"):
            assert words <= set(re.findall(r"`(\w+)", row)), axis.name


def test_the_results_are_those_of_the_linked_tables() -> None:
    rows = [line for line in (DOCS / "results.md").read_text().splitlines() if "±" in line]
    assert len(rows) == 6
    for row in rows:
        (table,) = re.findall(r"\]\((\S+table\.md)\)", row)
        recorded = (DOCS / table).read_text()
        assert all(number in recorded for number in re.findall(r"\d+\.\d ± \d\.\d", row)), row
