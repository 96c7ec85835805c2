"""The page in a browser: no network, no error, figures with hover, tables that sort, links that lead to records."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from studies.test_report import folder_of

from kernelbank.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
LIMIT = 6_000_000
"""The largest page in bytes."""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of(tmp_path_factory.mktemp("report with space"))
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_the_page_in_a_browser(browser: sync_api.Browser, page_file: Path, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True)
    page, problems, requests = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector(".plot .main-svg")
    assert requests == [page_file.as_uri()] and not problems
    assert page_file.stat().st_size < LIMIT
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # a phone does not scroll sideways
    assert page.locator(".verdicts .badge").count() >= 1
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_tables_sort_by_number(browser: sync_api.Browser, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    rows = page.locator("table.sortable tbody tr td:first-child")
    assert [text.split()[0] for text in rows.all_inner_texts()] == ["softmax", "relu"]
    header = page.get_by_role("button", name="test top-1", exact=True).first
    header.click()
    header.click()
    assert [text.split()[0] for text in rows.all_inner_texts()] == ["relu", "softmax"]
    assert header.locator("xpath=..").get_attribute("aria-sort") == "descending"
    page.close()


def test_hover_shows_values(browser: sync_api.Browser, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(page_file.as_uri())
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    page.wait_for_selector(".plot .main-svg")
    place = plot.evaluate(
        "p => { const a = p._fullLayout, b = p.getBoundingClientRect();"
        " return [b.x + a.xaxis._offset + a.xaxis.d2p(2), b.y + a.yaxis._offset + a.yaxis.d2p(60)]; }"
    )
    page.mouse.move(place[0] - 3, place[1])
    page.mouse.move(*place)
    hover = page.wait_for_selector(".plot .hoverlayer .hovertext")
    assert hover is not None and "epoch 2: 60.00 ± 0.00 %" in (hover.text_content() or "")
    page.close()


def test_numbers_lead_to_their_records(browser: sync_api.Browser, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.locator("table.sortable td.number a").first.click()
    link = page.locator("a[href='records/softmax-0.json']")
    link.wait_for(state="visible")  # the details around it have opened
    assert (page_file.parent / (link.get_attribute("href") or "")).exists()
    broken = page.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))"
        ".filter(id => !document.getElementById(decodeURIComponent(id)))"
    )
    assert broken == []
    page.close()
