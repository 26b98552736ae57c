"""A reader edits and runs the JavaScript lessons' cells in the page, and sees what the notebook has stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks/javascript/arrow-functions.ipynb"
ADDRESS = "https://book.test/"
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def page(browser: Browser, site: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The lesson's page; `page.complaints` are console errors and requests that the site's files do not answer."""
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    context = browser.new_context(color_scheme=asked.get("scheme", "light"), java_script_enabled=not asked.get("silent", False))
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.complaints = []

    def serve(route: Route) -> None:
        file = site / urlsplit(route.request.url).path.lstrip("/")
        if route.request.url.startswith(ADDRESS) and file.is_file():
            route.fulfill(path=file)
        else:
            page.complaints.append(f"not to be had: {route.request.url}")
            route.abort()

    context.route("**", serve)
    page.on("console", lambda message: page.complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(f"{ADDRESS}{NOTEBOOK.relative_to(ROOT).with_suffix('.html')}", wait_until="networkidle")
    yield page
    context.close()


def cells(page: Page) -> list[Locator]:
    return page.locator("article .cell:has(.js-run)").all()


def cell_with(page: Page, code: str) -> Locator:
    """The first cell whose code begins like this."""
    return next(cell for cell in cells(page) if cell.locator(".cell_input pre").text_content().startswith(code))


def press(cell: Locator, name: str) -> None:
    """Press a button of a cell; one in a folded solution is pressed all the same."""
    cell.locator(f".js-{name}").evaluate("button => button.click()")


def run(cell: Locator) -> str:
    """Run a cell and return what it printed."""
    press(cell, "run")
    cell.locator(".js-live[data-done]").wait_for(state="attached")
    return cell.locator(".js-live").evaluate("live => [...live.querySelectorAll('pre')].map(pre => pre.textContent).join('')")


def edit(cell: Locator, code: str) -> None:
    """Replace a cell's code."""
    press(cell, "edit")
    cell.locator("textarea").fill(code)


def stored(cell: nbformat.NotebookNode) -> str:
    """What the notebook has stored for a cell, as text."""
    texts = [output.text if output.output_type == "stream" else f"{output.data['text/plain']}\n" for output in cell.outputs]
    return "".join(texts)


def test_every_runnable_cell_prints_what_is_stored(page: Page) -> None:
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    expected = [cell for cell in code if "deno-only" not in cell.metadata.get("tags", [])]
    shown = cells(page)
    assert len(shown) == len(expected) > 30
    assert page.locator(".js-note").count() == len(code) - len(expected) > 0
    for cell, written in zip(shown, expected, strict=True):
        assert cell.locator(".cell_input pre").text_content().strip() == written.source.strip()
        assert run(cell) == stored(written), written.source
    assert page.complaints == []
    assert page.locator("iframe").count() == 0


def test_edited_cell_runs_and_is_reset(page: Page) -> None:
    cell = cell_with(page, "const area")
    before = cell.locator(".cell_output").first.inner_text()
    edit(cell, 'const area = 6 * 7;\nconsole.log("area", area);\narea / 2')
    cell.locator("textarea").press("Control+Enter")
    cell.locator(".js-live[data-done]").wait_for()
    assert cell.locator(".js-live").inner_text().split() == ["area", "42", "21"]
    after = cell_with(page, 'check(\n  "call, apply')
    assert "TypeError" in run(after) or "✗" in run(after)
    press(cell, "reset")
    assert cell.locator("textarea").count() == 0
    assert cell.locator(".cell_output").first.inner_text() == before
    assert "✓" in run(after)
    assert page.complaints == []


def test_endless_loop_is_stopped_with_one_message(page: Page) -> None:
    cell = cells(page)[1]
    edit(cell, 'console.log("before"); while (true) {}')
    assert run(cell) == "before\nStopped after 5 seconds: is there a loop without an end?\n"
    edit(cells(page)[2], 'while (true) console.log("flood")')
    press(cell, "reset")
    said = run(cells(page)[2])
    assert said.count("flood") == 500
    assert said.count("Stopped after") == 1
    assert page.complaints == []


def test_errors_are_told(page: Page) -> None:
    first, second = cells(page)[0], cells(page)[1]
    edit(second, 'console.log(1); throw new RangeError("far")')
    assert run(second) == "1\nRangeError: far\n"
    press(second, "reset")
    edit(second, "const = 1")
    assert run(second).startswith("SyntaxError: ")
    edit(first, "nowhere()")
    press(second, "reset")
    assert run(second).startswith("A cell above failed. ReferenceError: nowhere")
    assert page.complaints == []


def test_own_answer_is_checked_and_not_the_solution(page: Page) -> None:
    exercise = cell_with(page, "class Watch")
    check = cell_with(page, "const watch")
    assert "✓ three ticks" in run(check)
    edit(exercise, exercise.locator(".cell_input pre").text_content() + "\n// not solved")
    assert "✗ three ticks" in run(check)
    exercise.locator("textarea").fill("class Watch { ticks = 0; tick() { this.ticks += 1 } start(every) { every(this.tick.bind(this)) } }")
    assert run(check) == "✓ three ticks\n✓ tick is on the prototype\n"


def test_the_sandbox_reaches_nothing(page: Page) -> None:
    cell = cells(page)[1]
    edit(
        cell,
        """
        const reach = async (what) => { try { await what(); return "reached" } catch (error) { return "refused" } };
        console.log(typeof document, typeof parent, typeof localStorage, self.origin);
        console.log(await reach(() => fetch("https://book.test/index.html")));
        console.log(await reach(() => import("https://book.test/_static/javascript.js")));
        console.log(await reach(() => indexedDB.open("x")));
    """,
    )
    assert run(cell) == "undefined undefined undefined null\nrefused\nrefused\nrefused\n"
    assert not any("not to be had" in complaint for complaint in page.complaints)


def test_accessible_while_editing(page: Page, scheme: str) -> None:
    cell = cells(page)[1]
    edit(cell, "null.x")
    run(cell)
    run(cells(page)[4])
    found = Axe().run(page, options={"runOnly": WCAG})
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("silent", [True])
def test_without_javascript_the_stored_outputs_are_there(page: Page, silent: bool) -> None:
    assert silent
    assert page.locator(".js-run, .js-intro, .js-note").count() == 0
    assert "✓ the closure counts without any object" in page.locator("article").inner_text()


def test_other_pages_do_not_load_it(site: Path) -> None:
    loading = {path.stem for path in site.rglob("*.html") if "_static/javascript.js" in path.read_text()}
    assert loading == {NOTEBOOK.stem}
