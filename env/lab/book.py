"""The book: `python -m lab.book build` and `… store`, and the Sphinx extension that the build loads.

The extension shows which notebook is being executed, writes the tables of the page "This build" from what was found and
measured while building, draws the page "What runs where" from the lab's own status, and puts a banner on every page of a
site that was built from stored outputs.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import nbformat
import psutil
from docutils import nodes
from fontTools import subset
from jupyter_book.sphinx import build_sphinx
from myst_nb.sphinx_ import NbMetadataCollector
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image
from pygments.lexer import Lexer
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.token import Comment
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.console import nocolor
from sphinx.util.docutils import SphinxDirective

from lab import byo, settings, whereabouts
from lab.cli import Command
from lab.report import Report, Step

CELL_LIMIT = 600
"""Seconds that one cell may take; `_config.yml` says the same for a build."""

FACTS = ("system", "kernel", "processor", "memory", "python", "deno", "kubernetes", "kafka")
NAMED = {"python": "Python ", "deno": "Deno ", "kubernetes": "Kubernetes ", "kafka": "Kafka "}
"""What stands before a fact that does not say itself what it is."""


@cache
def machine() -> dict[str, str]:
    """What notebooks run on here, the facts under a measurement: each of FACTS that there is.

    Raises:
        LabError: A cluster or brokers of your own do not answer.
    """
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    own, lab = settings.own(), settings.find()
    embedded_cluster = f"{settings.KUBERNETES}, {len(lab.nodes)} nodes, embedded" if lab and lab.kubeconfig else ""
    embedded_brokers = f"{settings.KAFKA}, {len(settings.BROKER_IDS)} brokers, embedded" if lab and lab.bootstrap else ""
    facts = {
        "system": system,
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "deno": version("deno"),
        "kubernetes": byo.check_cluster(own.cluster) if own.cluster else embedded_cluster,
        "kafka": byo.check_brokers(own.brokers) if own.brokers else embedded_brokers,
    }
    return {name: fact for name, fact in facts.items() if fact}


def commit() -> str:
    """The checkout's commit, with a word if files differ from it, or "not a Git checkout"."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=, changed", "--exclude=*"],
                               cwd=settings.CHECKOUT, capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "not a Git checkout"
    return found.stdout.strip()


def stored_run(notebook: Path) -> dict[str, Any]:
    """When, in how many seconds and on what machine the stored outputs of `notebook` were made; empty if it does not say."""
    return nbformat.read(notebook, as_version=4).metadata.get("lab", {}).get("run", {})


def long_date(iso: str) -> str:
    """`2026-11-23` as `23 November 2026`."""
    day = date.fromisoformat(iso)
    return f"{day.day} {day:%B %Y}"


def unused(content: nbformat.NotebookNode) -> set[str]:
    """The facts about this machine that say nothing about a notebook's outputs."""
    if not in_javascript(content):
        return {"deno"}
    return {"python", "kubernetes", "kafka"} if not content.metadata.get("lab", {}).get("needs") else {"python"}


def in_javascript(content: nbformat.NotebookNode) -> bool:
    """Whether a notebook's cells are JavaScript, which a browser can run."""
    return content.metadata.get("kernelspec", {}).get("name") == "deno"


def store(notebook: Path, report: Report) -> bool:
    """Execute `notebook` in a fresh kernel and store its outputs in it.

    Nothing is stored unless every cell ran. The notebook's metadata then says when, how long and on what machine.

    Args:
        notebook: Its path.
        report: Told which cell is under way, and what failed.

    Returns:
        Whether every cell ran.
    """
    content = nbformat.read(notebook, as_version=4)
    started = time.time()
    try:
        with report.step(str(notebook)) as step:
            client = NotebookClient(
                content,
                timeout=CELL_LIMIT,
                kernel_name=content.metadata.get("kernelspec", {}).get("name", "python3"),
                record_timing=False,
                resources={"metadata": {"path": str(notebook.parent)}},
                on_cell_start=lambda cell, cell_index: step.progress(cell_index, len(content.cells), "cells"),
            )
            client.execute()
    except (CellExecutionError, CellTimeoutError, CellControlSignal, DeadKernelError) as error:
        report(f"{error}\n{notebook} was left as it was.")
        return False
    content.metadata.setdefault("lab", {})["run"] = {
        "date": datetime.fromtimestamp(started, UTC).date().isoformat(),
        "seconds": round(time.time() - started),
        "machine": {name: fact for name, fact in machine().items() if name not in unused(content)},
    }
    draft = notebook.with_suffix(".new")
    nbformat.write(content, draft)
    draft.replace(notebook)
    return True


@click.group(cls=Command)
def main() -> None:
    """Build the book, or store outputs in its notebooks."""


@main.command()
@click.option("--stored", is_flag=True, help="Execute nothing: take the outputs that are stored in the notebooks.")
@click.option("--builder", default="html", show_default=True, help="A Sphinx builder: html, linkcheck …")
@click.option("--into", default="_build", show_default=True, help="The folder for what is built.")
def build(stored: bool, builder: str, into: str) -> None:
    """Execute every notebook and build the site with Jupyter Book; a warning is an error, after everything was built."""
    if not sys.stderr.isatty():
        nocolor()
    source = settings.CHECKOUT
    overrides = {"external_toc_path": str(source / "_toc.yml"), "latex_individualpages": False}
    if stored:
        overrides["nb_execution_mode"] = "off"
    else:
        machine()
    status = build_sphinx(
        source,
        Path(into, builder).absolute(),
        noconfig=True,
        path_config=source / "_config.yml",
        confoverrides=overrides,
        builder=builder,
        freshenv=True,
        quiet=True,
        warningiserror=True,
        keep_going=True,
    )
    if status:
        sys.exit("The build failed: the causes are above.")
    if builder == "html":
        Report()(f"The book: {Path(into, builder, 'index.html').absolute().as_uri()}")


@main.command("store")
@click.argument("notebooks", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def store_all(notebooks: tuple[Path, ...]) -> None:
    """Execute NOTEBOOKS, or all of them, and store their outputs in them; after all of them, what ran where too."""
    report = Report()
    failed = [path for path in notebooks or sorted(Path("notebooks").rglob("[!.]*.ipynb")) if not store(path, report)]
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(map(str, failed))}")
    if not notebooks:
        whereabouts.save()


class Placeholder(nodes.General, nodes.Element):
    """Stands in a page for what can only be written when every notebook was executed."""


class Generated(SphinxDirective):
    """`{this-build} machine`, `{what-runs-where} picture` …: something generated from the build under way."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Leave a placeholder."""
        return [Placeholder(what=(self.name, self.arguments[0]))]


class Fill(SphinxPostTransform):
    """Puts in what the placeholders stand for."""

    default_priority = 8

    def run(self, **kwargs: Any) -> None:
        """Replace each placeholder."""
        makers = {
            ("this-build", "machine"): build_table,
            ("this-build", "notebooks"): notebook_table,
            ("what-runs-where", "picture"): where_picture,
            ("what-runs-where", "addresses"): where_addresses,
            ("what-runs-where", "addons"): where_addons,
        }
        for placeholder in list(self.document.findall(Placeholder)):
            placeholder.replace_self(makers[placeholder["what"]](self.env))


def what_runs(env: BuildEnvironment) -> dict[str, Any]:
    """What runs where: now, or, where nothing is executed or nothing runs, when outputs were last stored."""
    if not hasattr(env, "what_runs"):
        now = whereabouts.collect() if executing(env.config) else {}
        env.what_runs = now if now.get("machines") or now.get("brokers") else whereabouts.stored() | {"stored": True}
    return env.what_runs


def where_picture(env: BuildEnvironment) -> list[nodes.Node]:
    """The picture, and a line on when it was taken."""
    told = what_runs(env)
    day = long_date(told["date"])
    taken = (
        f"Not of this build: the lab as it was when outputs were stored, {day}." if told.get("stored") else f"The lab of this build, {day}."
    )
    memory = "Memory is what the processes hold, pages shared with others included."
    return [nodes.raw("", whereabouts.picture(told), format="html"), nodes.paragraph("", f"{taken} {memory}", classes=["where-taken"])]


def where_addresses(env: BuildEnvironment) -> nodes.table:
    """What answers at which address."""
    rows = [[what, nodes.literal("", address), who] for what, address, who in whereabouts.address_rows(what_runs(env))]
    return table(["What", "Address", "Answers to"], rows)


def where_addons(env: BuildEnvironment) -> nodes.table:
    """The add-ons."""
    rows = [[nodes.literal("", name), *map(inline, rest)] for name, *rest in whereabouts.addon_rows(what_runs(env))]
    return table(["Add-on", "What it is", "What it brings", "Its Pods", "Memory"], rows)


def inline(text: str) -> nodes.inline:
    """Text in which `code` stands between backquotes."""
    parts = [nodes.literal("", part) if index % 2 else nodes.Text(part) for index, part in enumerate(text.split("`"))]
    return nodes.inline("", "", *parts)


def build_table(env: BuildEnvironment) -> nodes.table:
    """The machine and the moment of this build."""
    rows: list[list[str | nodes.Node]] = [["Built", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"], ["Commit", commit()]]
    rows += [[key.capitalize(), value] for key, value in machine().items() if executing(env.config) or key not in ("kubernetes", "kafka")]
    return table(["What", "This build"], rows)


def notebook_table(env: BuildEnvironment) -> nodes.table:
    """Each notebook, in the book's order: executed in this build and for how long, or when its stored outputs were made and on what."""
    rows: list[list[str | nodes.Node]] = []
    chapters = [name for listed in env.toctree_includes.values() for name in listed]
    for name in (name for name in chapters if env.doc2path(name).endswith(".ipynb")):
        title = nodes.reference(
            "", env.titles[name].astext(), internal=True, refuri=env.app.builder.get_relative_uri("book/this-build", name)
        )
        if executing(env.config):
            run = NbMetadataCollector.get_doc_data(env)[name].get("exec_data") or {}
            when = f"{datetime.fromtimestamp(run['mtime'], UTC):%Y-%m-%d %H:%M} UTC" if run else "not executed"
            rows.append([title, when, f"{run['runtime']:.0f} s" if run.get("succeeded") else "failed", "this one"])
        else:
            run = stored_run(Path(env.doc2path(name)))
            where = ", ".join(f"{NAMED.get(name, '')}{run['machine'][name]}" for name in FACTS if name in run["machine"]) if run else ""
            rows.append([title, long_date(run["date"]) if run else "unknown", f"{run['seconds']} s" if run else "", where])
    return table(["Notebook", "Executed", "Run time", "Machine"], rows)


def table(head: list[str], rows: list[list[str | nodes.Node]]) -> nodes.table:
    """A docutils table with one header row."""

    def row(cells: list[str | nodes.Node]) -> nodes.row:
        paragraphs = [nodes.paragraph("", "", nodes.Text(cell) if isinstance(cell, str) else cell) for cell in cells]
        return nodes.row("", *(nodes.entry("", paragraph) for paragraph in paragraphs))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    group += [nodes.thead("", row(list(head))), nodes.tbody("", *(row(cells) for cells in rows))]
    return nodes.table("", group, classes=["colwidths-auto"])


def executing(config: Config) -> bool:
    """Whether this build executes the notebooks."""
    return config.nb_execution_mode != "off"


class WrittenLexer(Lexer):
    """Colours a cell that begins with `%%writefile NAME` as a file of that name."""

    name = "written"

    def get_tokens_unprocessed(self, text: str) -> Iterator[tuple[int, Any, str]]:
        """The magic line, then the file."""
        magic, line_end, content = text.partition("\n")
        path = Path(magic.split()[-1])
        try:
            lexer = get_lexer_for_filename(path.with_suffix(".yaml").name if path.suffix == ".tpl" else path.name)
        except ClassNotFound:
            lexer = TextLexer()
        yield 0, Comment.Preproc, magic + line_end
        for start, kind, value in lexer.get_tokens_unprocessed(content):
            yield start + len(magic) + 1, kind, value


class ColourFiles(SphinxPostTransform):
    """Has WrittenLexer colour the cells that write files: Python's would stumble over what is in them."""

    default_priority = 8

    def run(self, **kwargs: Any) -> None:
        """Name the lexer in each such cell."""
        for block in self.document.findall(nodes.literal_block):
            if block.astext().startswith("%%writefile "):
                block["language"] = WrittenLexer.name


class Progress:
    """One line per notebook while Sphinx reads and executes it."""

    def __init__(self) -> None:
        self.report = Report()
        self.step: AbstractContextManager[Step] | None = None

    def begin(self, app: Sphinx, name: str, content: list[str]) -> None:
        """Open the line of the notebook that Sphinx is about to execute; handler of `source-read`."""
        path = Path(app.env.doc2path(name))
        if path.suffix == ".ipynb" and executing(app.config):
            run = stored_run(path)
            self.step = self.report.step(f"{name} ({run['seconds']} s the last time)" if run else name)
            self.step.__enter__()

    def end(self, app: Sphinx, doctree: nodes.document) -> None:
        """Close that line; handler of `doctree-read`."""
        run = NbMetadataCollector.get_doc_data(app.env)[app.env.docname].get("exec_data") or {}
        failed = RuntimeError(run["error"]) if run.get("error") else None
        self.close(failed)
        if failed:
            self.report(run["traceback"].rpartition("CellExecutionError: ")[2])

    def close(self, error: Exception | None) -> None:
        """Close the line that is open, if one is."""
        if self.step:
            self.step.__exit__(type(error) if error else None, error, None)
            self.step = None


def add_versions(app: Sphinx, config: Config) -> None:
    """Let pages say `{{ kubernetes }}` and `{{ kafka }}`; handler of `config-inited`."""
    config.myst_substitutions = {**config.myst_substitutions, "kubernetes": settings.KUBERNETES, "kafka": settings.KAFKA}


def add_banner(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Say on each page of a site that executed nothing where its outputs come from; handler of `html-page-context`."""
    if executing(app.config):
        return
    paths = [Path(app.env.doc2path(name)) for name in ([page] if page in app.env.found_docs else [])]
    if not any(path.suffix == ".ipynb" for path in paths):
        paths = [Path(app.env.doc2path(name)) for name in app.env.found_docs]
    days = sorted({run["date"] for path in paths if path.suffix == ".ipynb" and (run := stored_run(path))})
    when = " to ".join(long_date(day) for day in dict.fromkeys([days[0], days[-1]])) if days else "an unknown date"
    context["theme_announcement"] = f"Built from stored outputs of {when}, not executed in this build."


def add_editor(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Let a reader edit and run cells in JavaScript in the page; handler of `html-page-context`."""
    path = Path(app.env.doc2path(page)) if page in app.env.found_docs else Path()
    if path.suffix == ".ipynb" and in_javascript(nbformat.read(path, as_version=4)):
        app.add_css_file("javascript.css")
        app.add_js_file("javascript.js", loading_method="defer")


def drop_thebe(app: Sphinx, config: Config) -> None:
    """Take away the scripts that Jupyter Book adds for running cells on a far server; handler of `config-inited`."""
    for listener in [one for event in app.events.listeners.values() for one in event]:
        if listener.handler.__module__ == "sphinx_thebe" and listener.handler.__name__ in ("init_thebe_core", "update_thebe_context"):
            app.disconnect(listener.id)


def slim_icons(app: Sphinx, error: Exception | None) -> None:
    """Keep of the theme's icon font only what the pages show: 3 KB instead of 156; handler of `build-finished`."""
    static = Path(app.outdir, "_static")
    font = static / "vendor/fontawesome/webfonts/fa-solid-900.woff2"
    if error or not font.is_file():
        return
    styles = "".join(path.read_text() for path in static.rglob("*.css"))
    pages = "".join(path.read_text() for path in [*Path(app.outdir).rglob("*.html"), *static.glob("scripts/*.js")])
    used = set(re.findall(r"\bfa-[a-z0-9-]+", pages))
    shown = re.findall(r"[\ue000-\uf8ff]", styles)
    for selectors, code in re.findall(r'([^{}]*)\{[^{}]*content:\s*"\\([0-9a-f]{2,4})"', styles):
        names = set(re.findall(r"\.(fa-[a-z0-9-]+)", selectors))
        if not names or names & used:
            shown.append(chr(int(code, 16)))
    options = subset.Options(flavor="woff2")
    content = subset.load_font(font, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(shown))
    subsetter.subset(content)
    subset.save_font(content, font, options)


def slim_plots(app: Sphinx, error: Exception | None) -> None:
    """Make pages with many plots open fast; handler of `build-finished`.

    Plots get a palette of 256 colours, of which they have few more: less than half of the bytes. Their size in the page
    keeps their place, so that a browser can leave each until the reader comes near.
    """
    sizes = {}
    for path in Path(app.outdir, "_images").glob("*.png"):
        with Image.open(path) as plot:
            sizes[path.name] = plot.size
            opaque = plot.mode == "RGB" or (plot.mode == "RGBA" and plot.getextrema()[3] == (255, 255))
            slim = plot.convert("RGB").quantize(256, dither=Image.Dither.NONE) if opaque else None
        if slim:
            slim.save(path, optimize=True)

    def place(match: re.Match[str]) -> str:
        width, height = sizes[match[2]]
        return f'<img loading="lazy" width="{width}" height="{height}"{match[1]}'

    for path in Path(app.outdir).rglob("*.html"):
        path.write_text(re.sub(r'<img((?![^>]* width=)[^>]* src="[^"]*_images/([^"/]+\.png)")', place, path.read_text()))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx (https://www.sphinx-doc.org/en/master/extdev/)."""
    progress = Progress()
    app.add_node(Placeholder)
    app.add_directive("this-build", Generated)
    app.add_directive("what-runs-where", Generated)
    app.add_post_transform(Fill)
    app.add_lexer(WrittenLexer.name, WrittenLexer)
    app.add_post_transform(ColourFiles)
    app.connect("config-inited", add_versions)
    app.connect("config-inited", drop_thebe)
    app.connect("source-read", progress.begin)
    app.connect("doctree-read", progress.end)
    app.connect("build-finished", lambda app, error: progress.close(error))
    app.connect("build-finished", slim_icons)
    app.connect("build-finished", slim_plots)
    app.connect("html-page-context", add_banner, priority=900)
    app.connect("html-page-context", add_editor)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}


if __name__ == "__main__":
    main()
