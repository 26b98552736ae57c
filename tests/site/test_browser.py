"""Every page as a reader meets it: on a phone and a laptop, in the light and in the dark, offline."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from fontTools.ttLib import TTFont
from playwright.sync_api import Browser, Page, Route

ROOT = Path(__file__).parents[2]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
"""The rules of https://www.w3.org/TR/WCAG22/, levels A and AA, as axe-core tags them."""
FEW_OF_A_KIND = """() => {
    const seen = {}
    for (const token of document.querySelectorAll(".highlight span[class]")) {
        const kind = token.closest("[class*=cell_output]") ? `output ${token.className}` : token.className
        seen[kind] = (seen[kind] ?? 0) + 1
        if (seen[kind] > 5) token.replaceWith(token.textContent)
    }
}"""
"""Leaves of each kind of coloured word five: the thousands of others look the same, and axe would measure each against its ground."""
ADDRESS = "https://book.test/"
PACKED = (".png", ".woff2")
HEAVIEST = 300_000
"""Bytes of a page with all that it loads before the reader scrolls, compressed."""


@pytest.fixture(params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return f"{request.param}.html"


@pytest.fixture
def open_page(browser: Browser, site: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page of the site.

    The browser gets every file straight from the build. Console errors, what is not there and what is asked of another site
    gather in `page.complaints`; the compressed size of each file, in bytes, in `page.weights`.
    """
    contexts = []

    def opened(name: str, scheme: str = "light", width: int = 1280) -> Page:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, permissions=["clipboard-read"])
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.weights = [], {}

        def serve(route: Route) -> None:
            address = route.request.url
            file = site / urlsplit(address).path.lstrip("/")
            if not address.startswith(ADDRESS) or not file.is_file():
                page.complaints.append(f"not to be had: {address}")
                route.abort()
                return
            body = file.read_bytes()
            page.weights[file.relative_to(site)] = len(body if file.suffix in PACKED else gzip.compress(body))
            route.fulfill(path=file)

        context.route("**", serve)
        page.on("console", lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(ADDRESS + name, wait_until="networkidle")
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_loads_without_complaint_and_fits(open_page: Callable[..., Page], name: str, width: int) -> None:
    page = open_page(name, width=width)
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.weights) > 5
    assert sum(page.weights.values()) < HEAVIEST, "\n".join(f"{size:8} {file}" for file, size in page.weights.items())
    height = page.evaluate("document.documentElement.scrollHeight")
    page.evaluate("Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode() }))")
    assert page.evaluate("document.documentElement.scrollHeight") == height
    plots = "[...document.querySelectorAll('main img')].filter(image => image.naturalWidth)"
    assert all(
        abs(ratio - 1) < 0.02
        for ratio in page.evaluate(f"{plots}.map(image => image.width / image.height * image.naturalHeight / image.naturalWidth)")
    )
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(open_page: Callable[..., Page], name: str, scheme: str, tmp_path: Path) -> None:
    page = open_page(name, scheme=scheme)
    page.screenshot(path=tmp_path / "page.png")
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b, 0)")
    assert (brightness > 600) if scheme == "light" else (brightness < 150)
    page.evaluate(FEW_OF_A_KIND)
    found = Axe().run(page, options={"runOnly": WCAG})
    assert found.violations_count == 0, found.generate_report()


def test_icons_are_in_the_font(site: Path) -> None:
    file = site / "_static/vendor/fontawesome/webfonts/fa-solid-900.woff2"
    icons = {"bars": 0xF0C9, "search": 0xF002, "download": 0xF019, "theme": 0xF042, "contents": 0xF03A, "note": 0xF05A, "exercise": 0xF303}
    assert set(icons.values()) <= set(TTFont(file).getBestCmap())
    assert file.stat().st_size < 10_000


def test_search_finds_a_lesson(open_page: Callable[..., Page]) -> None:
    page = open_page("search.html?q=partition")
    page.wait_for_selector("#search-results li a")
    assert page.locator("#search-results li a").count() >= 1
    assert page.complaints == []


def test_copy_takes_the_code_alone(open_page: Callable[..., Page]) -> None:
    page = open_page(next(name for name in PAGES if name.startswith("notebooks/")) + ".html")
    cell = page.locator(".cell_input").first
    cell.hover()
    cell.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == cell.locator("pre").inner_text().strip()
    assert page.locator(".cell_output button.copybtn").count() == 0
