"""Every notebook again and again, compared with its stored outputs each time: what varies shows sooner or later.

`make soak N=10` runs it; `make soak N=10 BUSY=1` keeps one processor busy with something else meanwhile.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import nbformat
from rich.console import Console
from rich.table import Table

from lab import settings
from lab.report import Report

LAB = (sys.executable, "-m", "lab")
ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "_build" / "soak"
SPIN = "import os; os.nice(0)\nwhile os.getppid() == {parent}: sum(range(100_000))"


@dataclass(frozen=True)
class Run:
    """One run of one notebook.

    Args:
        seconds: How long it took.
        cells: How many cells were compared.
        differing: What differed or failed, a line each.
        skipped: Why it did not run, or "".
    """

    seconds: float
    cells: int
    differing: tuple[str, ...]
    skipped: str


def run(notebook: Path, log: Path) -> Run:
    """Execute a notebook and compare each cell with its stored output.

    Args:
        notebook: Its path.
        log: Where what pytest says goes if something differs.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        told = Path(scratch, "told.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={told}", notebook],
            cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = time.monotonic() - began
        cases = list(xml.parse(told).iter("testcase")) if told.exists() else []
    differing = tuple(case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None)
    skips = [case.find("skipped").get("message", "") for case in cases if case.find("skipped") is not None]
    if done.returncode and not differing:
        differing = ("pytest itself failed",)
    if differing:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
    return Run(seconds, len(cases) - len(skips), differing, skips[0] if skips and len(skips) == len(cases) else "")


@contextmanager
def busy(processors: int) -> Iterator[None]:
    """Keep processors busy until the block ends; a busy process ends with this one, too."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN.format(parent=os.getpid())]) for _ in range(processors)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def summary(runs: dict[Path, list[Run]]) -> Table:
    """A row per notebook: passed, failed, the median and the worst time, and which cells ever differed."""
    table = Table(box=None, pad_edge=False)
    for heading in ("notebook", "passed", "failed", "median s", "worst s", "cells that differed"):
        table.add_column(heading, justify="left" if heading in ("notebook", "cells that differed") else "right", overflow="fold")
    for notebook, mine in runs.items():
        ran = [one for one in mine if not one.skipped]
        if not ran:
            table.add_row(str(notebook.relative_to(ROOT)), "–", "–", "–", "–", mine[0].skipped)
            continue
        seconds = [one.seconds for one in ran]
        cells = sorted({re.sub(r".*::", "", name) for one in ran for name in one.differing})
        table.add_row(
            str(notebook.relative_to(ROOT)),
            str(sum(not one.differing for one in ran)),
            str(sum(bool(one.differing) for one in ran)),
            f"{statistics.median(seconds):.0f}",
            f"{max(seconds):.0f}",
            ", ".join(cells) or "none",
        )
    return table


def exceptions() -> Table:
    """Each cell whose output is not compared, with its reason, and each rule of what is noise."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for notebook in sorted((ROOT / "notebooks").rglob("[!.]*.ipynb")):
        for number, cell in enumerate(cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"):
            if "nbval-ignore-output" in cell.metadata.get("tags", []):
                table.add_row(f"{notebook.stem}, Cell {number}", cell.metadata.get("lab", {}).get("varies", "no reason is given"))
    for reason, name in re.findall(r"^([^\n\[]+)\n\[(\w+)\]", (ROOT / "tests" / "sanitize.cfg").read_text(), re.MULTILINE):
        table.add_row(f"sanitize.cfg, {name}", reason)
    return table


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="How often each notebook is run.")
@click.option("--busy", "processors", type=click.IntRange(0), default=0, help="How many processors to keep busy meanwhile.")
@click.argument("notebooks", nargs=-1, type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
def main(rounds: int, processors: int, notebooks: tuple[Path, ...]) -> None:
    """Run NOTEBOOKS, or all of them, again and again, and print how often each passed."""
    chosen = list(notebooks) or sorted((ROOT / "notebooks").rglob("[!.]*.ipynb"))
    runs: dict[Path, list[Run]] = defaultdict(list)
    report, console = Report(), Console(highlight=False, width=max(Console().width, 100))
    running = settings.find() is not None
    if not running:
        subprocess.run([*LAB, "up"], cwd=ROOT)
    try:
        with busy(processors), report.step(f"{rounds} × {len(chosen)} notebooks") as step:
            for number in range(rounds):
                for place, notebook in enumerate(chosen):
                    one = run(notebook, LOGS / f"{notebook.stem}-{number + 1}.log")
                    runs[notebook].append(one)
                    verdict = one.skipped or ", ".join(one.differing) or f"{one.cells} cells as stored"
                    report(f"  {number + 1}/{rounds} {notebook.stem}: {verdict}, {one.seconds:.0f} s")
                    step.progress(number * len(chosen) + place + 1, rounds * len(chosen), "runs")
    except KeyboardInterrupt:
        report("Interrupted; so far:")
    finally:
        if not running:
            subprocess.run([*LAB, "down"], cwd=ROOT, capture_output=True)
    console.print(summary(runs))
    console.print("\nNot compared:", exceptions(), sep="\n")
    failed = sum(bool(one.differing) for mine in runs.values() for one in mine)
    if failed:
        console.print(f"\n{failed} runs differed; what pytest said of each is in {LOGS.relative_to(ROOT)}.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
