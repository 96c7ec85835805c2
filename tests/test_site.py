"""The site that MkDocs builds from docs/: without a warning, without a dead link, and readable without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import kernelbank

pytest.importorskip("mkdocs", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}
PHONE, DESKTOP = 390, 1280


class Links(HTMLParser):
    """The addresses that a page names, by element and attribute, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[tuple[str, str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        self.addresses += [(tag, name, given[name]) for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    found = {path: Links(path.read_text()) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    assert {path.relative_to(site).with_suffix(".md") for path in found} >= {
        path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")
    }
    return found


def test_every_internal_link_leads_somewhere(pages: dict[Path, Links]) -> None:
    followed = 0
    for path, page in pages.items():
        for tag, _, address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {address}"
            anchor = unquote(parts.fragment)
            if tag == "a" and anchor and target.suffix == ".html":
                assert anchor in pages[target].anchors, f"{path.name}: {address}"
            followed += 1
    assert followed > 1000


def test_no_page_loads_anything_from_the_network(site: Path, pages: dict[Path, Links]) -> None:
    for path, page in pages.items():
        loaded = [address for tag, name, address in page.addresses if (tag, name) in LOADED]
        assert loaded and not [address for address in loaded if urlsplit(address).netloc], path.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_every_public_name_is_in_the_reference(pages: dict[Path, Links]) -> None:
    anchors = set().union(*(page.anchors for page in pages.values()))
    assert {f"kernelbank.{name}" for name in kernelbank.__all__} <= anchors


def test_the_blocks_of_the_pages_are_blocks_of_the_site(site: Path) -> None:
    """Among them those with a second word behind the language."""
    for path in (ROOT / "docs").glob("*.md"):
        blocks = re.findall(r"^```(\w+)", path.read_text(), re.MULTILINE)
        html = (site / path.with_suffix(".html").name).read_text()
        assert re.findall(r'<div class="language-((?!text)\w+) highlight"', html) == blocks, path.name
        assert "```" not in html, path.name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, width: int) -> tuple[Any, list[str], list[str]]:
    """A tab, the addresses outside this machine that it asks for, and its errors."""
    tab = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    asked: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    return tab, asked, errors


def test_the_search_works_from_files(browser: Any, site: Path) -> None:
    tab, asked, errors = opened(browser, DESKTOP)
    tab.goto((site / "index.html").as_uri())
    tab.locator(".md-search__input").fill("Linformer")
    found = tab.locator(".md-search-result__link").first
    found.wait_for(timeout=10_000)
    assert found.get_attribute("href").partition("?")[0].endswith(".html")
    assert "Linformer" in tab.locator(".md-search-result__list").inner_text()
    assert (asked, errors) == ([], [])


def test_no_page_is_wider_than_a_phone(browser: Any, site: Path, pages: dict[Path, Links]) -> None:
    tab, asked, errors = opened(browser, PHONE)
    for path in pages:
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE, path.name
    assert (asked, errors) == ([], [])
