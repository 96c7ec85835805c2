"""The page in a real browser: nothing is fetched, nothing fails, and what is pointed at changes what it should."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from equality import build, draw
from pages import column, noise, render
from strategies import Host
from tiny_models import drawn

import kernelbank.models  # noqa: F401  (registers ours with timm)
from kernelbank.atlas import ROWS
from kernelbank.spec import MixerSpec

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page that is open in the browser, what it complained about and what it asked for."""

    def __init__(self, browser: Any, html: str, path: Path, **options: Any) -> None:
        path.write_text(html)
        self.context = browser.new_context(**({"viewport": {"width": 1300, "height": 1000}} | options))
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error.stack)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()
        self.wait("window.kernelbank && window.kernelbank.ready")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true. (The page's policy forbids the evaluation that playwright waits with.)"""
        for _ in range(200):
            if self.page.evaluate(f"() => Boolean({condition})"):
                return
            time.sleep(0.02)
        raise AssertionError(f"not {condition}; {self.errors}")

    def text(self, selector: str, index: int = 0) -> str:
        return str(self.page.locator(selector).nth(index).inner_text())

    def drawing(self, selector: str, index: int = 0) -> str:
        return str(self.page.locator(selector).nth(index).evaluate("canvas => canvas.toDataURL()"))

    def state(self, name: str) -> Any:
        return self.page.evaluate(f"window.kernelbank.state.{name}")

    def point(self, down: float, along: float, index: int = 0) -> None:
        box = self.page.locator(".picture").nth(index).bounding_box()
        self.page.mouse.move(box["x"] + along * box["width"], box["y"] + down * box["height"])

    def close(self) -> None:
        self.context.close()
        assert self.errors == [] and self.requests == [self.address]


@pytest.fixture(scope="module")
def windows() -> str:
    model = drawn(timm.create_model("swin_kb_test_patch4_window7_64", mixer="swin support=window(4, alternate)"), 0.1)
    return render("windows", [column(model, noise(1, 3, 64, 64), noise(1, 3, 64, 64, seed=4), label="windows")])


@pytest.fixture(scope="module")
def pair() -> str:
    first = drawn(timm.create_model("vit_kb_test_patch16_64", mixer="vit_relpos activation=relu,count"), 0.3)
    second = drawn(timm.create_model("vit_kb_test_patch16_64", mixer="dwsa"), 0.3)
    images = noise(1, 3, 64, 64)
    return render("pair", [column(first, images, label="relu"), column(second, images, label="gate")])


def test_pointing_changes_weights_sentence_and_heads(browser: Any, pair: str, tmp_path: Path) -> None:
    shown = Opened(browser, pair, tmp_path / "a.html")
    shown.point(0.1, 0.1)
    first = shown.text(".facts"), shown.drawing(".picture"), shown.drawing(".heads canvas", 1)
    assert first[0].startswith("Row 1, column 1. Mean over heads: effective number ")
    shown.point(0.9, 0.6)
    second = shown.text(".facts"), shown.drawing(".picture"), shown.drawing(".heads canvas", 1)
    assert second[0].startswith("Row 4, column 3.") and all(a != b for a, b in zip(first, second, strict=True))
    assert "the weights are no distribution" in second[0]
    shown.page.locator(".heads button").nth(2).click()
    assert shown.text(".facts").startswith("Row 4, column 3. Head 1: ")
    assert shown.page.locator(".heads button").nth(2).get_attribute("aria-pressed") == "true"
    shown.close()


def test_two_models_are_linked(browser: Any, pair: str, tmp_path: Path) -> None:
    shown = Opened(browser, pair, tmp_path / "a.html")
    shown.point(0.1, 0.1, index=0)
    before = shown.drawing(".picture", 1)
    assert shown.text(".facts", 1).startswith("Row 1, column 1.")
    shown.point(0.9, 0.9, index=1)
    assert shown.text(".facts", 0).startswith("Row 4, column 4.") and shown.drawing(".picture", 1) != before
    layer = shown.text(".layer-name", 1)
    shown.page.locator("#more").click()
    shown.wait("window.kernelbank.ready")
    assert shown.text(".layer-name", 1) != layer
    assert shown.page.locator(".classes li").first.inner_text().startswith("first <b>class</b>")
    assert [shown.text("h2", index) for index in (0, 1)] == ["relu", "gate"]
    titles = [shown.text(".model:nth-child(2) .parts figcaption", index) for index in range(3)]
    assert [title.splitlines()[0] for title in titles] == ["dynamic part", "positional part", "effective kernel"]
    shown.close()


def test_keys_move_and_change_layer_head_theme_and_picture(browser: Any, pair: str, tmp_path: Path) -> None:
    shown = Opened(browser, pair, tmp_path / "a.html", color_scheme="light")
    shown.point(0.1, 0.1)
    for key, place in {"Right": (1, 2), "Down": (2, 2), "Left": (2, 1), "Up": (1, 1)}.items():
        shown.page.keyboard.press(f"Arrow{key}")
        assert shown.text(".facts").startswith(f"Row {place[0]}, column {place[1]}")
    shown.page.keyboard.press("ArrowUp")
    assert shown.text(".facts").startswith("Row 1, column 1")
    depth = shown.state("depth")
    shown.page.keyboard.press("[")
    shown.wait("window.kernelbank.ready")
    assert shown.state("depth") == depth - 1
    shown.page.keyboard.press("h")
    assert shown.text(".facts").startswith("Row 1, column 1. Head 0")
    light, colours = shown.drawing(".picture"), shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.page.keyboard.press("t")
    assert shown.drawing(".picture") != light
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") != colours
    weights = shown.drawing(".picture")
    shown.page.keyboard.press("p")
    assert shown.drawing(".picture") != weights and shown.page.locator("#alone").is_checked()
    shown.page.locator("#scale input").nth(1).check()
    shown.page.keyboard.press("p")
    assert shown.state("scale") == "heads"
    shown.close()


def test_touch_on_a_small_screen(browser: Any, pair: str, tmp_path: Path) -> None:
    options = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
    shown = Opened(browser, pair, tmp_path / "a.html", **options)
    box = shown.page.locator(".picture").first.bounding_box()
    shown.page.touchscreen.tap(box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"])
    assert shown.text(".facts").startswith("Row 4, column 1.")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
    shown.close()


def test_a_dark_screen_opens_dark(browser: Any, pair: str, tmp_path: Path) -> None:
    shown = Opened(browser, pair, tmp_path / "a.html", color_scheme="dark")
    assert shown.page.evaluate("document.documentElement.dataset.theme") == "dark"
    shown.page.emulate_media(color_scheme="light")
    shown.wait("document.documentElement.dataset.theme === 'light'")
    shown.close()


def test_windows_pictures_and_the_chart(browser: Any, windows: str, tmp_path: Path) -> None:
    shown = Opened(browser, windows, tmp_path / "a.html")
    shown.page.evaluate("window.kernelbank.show(0)")
    shown.point(0.01, 0.3)
    assert shown.text(".facts").startswith("Row 1, column 5, which sees rows 1 to 4, columns 5 to 8. Mean over heads")
    first = shown.drawing(".picture")
    shown.page.locator("#pictures button").nth(1).click()
    shown.wait("window.kernelbank.ready && window.kernelbank.state.image === 1")
    assert shown.drawing(".picture") != first
    chart = shown.page.locator(".depth polyline").get_attribute("points")
    shown.page.locator(".depth select").select_option("distance")
    assert shown.page.locator(".depth polyline").get_attribute("points") != chart
    box = shown.page.locator(".depth svg").bounding_box()
    shown.page.mouse.click(box["x"] + 0.97 * box["width"], box["y"] + box["height"] / 2)
    shown.wait("window.kernelbank.ready && window.kernelbank.state.depth === 5")
    assert shown.text(".layer-name").startswith("layers.3.blocks.1.attn")
    shown.close()


def test_every_row_of_the_atlas_is_drawn(browser: Any, tmp_path: Path) -> None:
    host = Host(32, 4, (5, 6), 1, 1)
    for start in range(0, len(ROWS), 2):
        columns = []
        for row in list(ROWS)[start : start + 2]:
            mixer = build(MixerSpec.parse(row).at_block(0), host).eval()
            columns.append(column(mixer, draw(mixer, 1)[0], label=row))
        shown = Opened(browser, render("rows", columns), tmp_path / f"{start}.html")
        for index, one in enumerate(columns):
            shown.point(0.9, 0.9, index)
            assert shown.text(".facts", index).startswith("Row 5, column 6"), one.label
            assert "NaN" not in shown.page.locator(".model").nth(index).inner_text(), one.label
            shown.page.locator(f'[data-model="{index}"] .chips button').first.click()
            assert shown.text(".facts", index).startswith("The class token"), one.label
        shown.close()


@pytest.mark.slow
def test_the_goals_of_a_page(browser: Any, tmp_path: Path) -> None:
    """DeiT-S, and Swin-T at 448 x 448: below 8 MB, and a move is answered within 16 ms."""
    for name, options in {"deit_small_patch16_224": {}, "swin_tiny_patch4_window7_224": {"img_size": 448}}.items():
        model = timm.create_model(name, **options).eval()
        side = options.get("img_size", 224)
        html = render("goal", [column(model, noise(1, 3, side, side))])
        assert len(html) < 8e6, f"{name}: {len(html) / 1e6:.1f} MB"
        shown = Opened(browser, html, tmp_path / f"{name}.html")
        moves = []
        for step in range(1, 40):
            shown.point(step / 40, step / 40)
            moves.append(shown.page.evaluate("window.kernelbank.lastMove"))
            time.sleep(0.02)
        assert sorted(moves)[len(moves) // 2] < 16, f"{name}: {sorted(moves)}"
        shown.close()
