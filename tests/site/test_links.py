"""Every link, picture and anchor inside the site leads somewhere, and nothing is fetched from elsewhere."""

import json
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

HOST = "http://site/"
SNAPSHOT = Path(__file__).parents[2] / "book" / "what-runs-where.json"
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@cache
def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, BeautifulSoup]:
    found = {str(path.relative_to(site)): parse(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    assert "book/index.html" in found
    return found


def references(name: str, page: BeautifulSoup) -> list[str]:
    values = [tag[attribute] for attribute in ("href", "src", "data") for tag in page.find_all(attrs={attribute: True})]
    return [urljoin(HOST + name, value) for value in values]


def test_internal_links_and_anchors(site: Path, pages: dict[str, BeautifulSoup]) -> None:
    broken, seen = [], 0
    for name, page in pages.items():
        for address in references(name, page):
            parts = urlsplit(address)
            if not address.startswith(HOST):
                continue
            seen += 1
            target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{name}: {address}")
            elif parts.fragment and target.suffix == ".html":
                fragment = unquote(parts.fragment)
                if not parse(target).find(attrs={"id": fragment}) and not parse(target).find("a", attrs={"name": fragment}):
                    broken.append(f"{name}: {address} (no such anchor)")
    assert seen > 100
    assert not broken, "\n".join(broken)


def test_nothing_is_fetched_from_elsewhere(pages: dict[str, BeautifulSoup]) -> None:
    fetched = [
        f"{name}: {tag[attribute]}"
        for name, page in pages.items()
        for element, attribute in FETCHED.items()
        for tag in page.find_all(element, attrs={attribute: True})
        if not urljoin(HOST + name, tag[attribute]).startswith((HOST, "data:"))
    ]
    assert not fetched, "\n".join(fetched)


def test_pictures_have_alternative_text(pages: dict[str, BeautifulSoup]) -> None:
    silent = [
        f"{name}: {image['src'][:80]}"
        for name, page in pages.items()
        for image in page.select("article img:not([alt]), article img[alt='']")
    ]
    assert not silent, "\n".join(silent)


def test_every_page_has_one_main_heading(pages: dict[str, BeautifulSoup]) -> None:
    for name, page in pages.items():
        if article := page.find("article"):
            assert len(article.find_all("h1")) == 1, name


def test_every_lesson_is_on_the_home_page(pages: dict[str, BeautifulSoup]) -> None:
    home = set(references("book/index.html", pages["book/index.html"].find("article")))
    lessons = {HOST + name for name in pages if name.startswith("notebooks/")}
    assert lessons
    assert lessons <= home


def test_stored_outputs_are_announced_on_every_page(pages: dict[str, BeautifulSoup]) -> None:
    for name, page in pages.items():
        if page.find("article"):
            banner = page.find(class_="bd-header-announcement")
            assert banner and "not executed in this build" in banner.text, name


def test_what_runs_where_is_drawn_from_the_snapshot(pages: dict[str, BeautifulSoup]) -> None:
    told = json.loads(SNAPSHOT.read_text())
    page = pages["book/what-runs-where.html"]
    drawn = [box.b.text for box in page.select(".where-machine")]
    assert drawn == [machine["name"] for machine in told["machines"]]
    shown = [box.b.text for box in page.select(".where-pods > li")]
    assert shown == [pod["workload"] for machine in told["machines"] for pod in machine["pods"]]
    assert "Not of this build" in page.select_one(".where-taken").text
