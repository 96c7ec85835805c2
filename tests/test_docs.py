"""The pages that teach: every Python block runs, one namespace per page, and what a comment promises is printed."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("dense", "finetune", "new_mixer", "spec", "start")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^print\(.*\) +# (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = BLOCK.findall((DOCS / f"{page}.md").read_text())
    assert blocks
    names: dict[str, object] = {"__name__": "__main__"}
    promises = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}.md, block {number}", "exec"), names)
            promises += PROMISE.findall(block)
    printed = capsys.readouterr().out
    for promise in promises:
        # a promise may go on with an explanation after ": "
        assert promise.split(": ")[0] in printed, f"{page}.md promises {promise!r}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in LINK.findall((DOCS / page).read_text()):
        assert (DOCS / target).exists(), f"{page}: {target}"
