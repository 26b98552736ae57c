"""What a person sees while the lab works: one line per step, with progress and an honest time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

QUIET_INTERVAL = 20.0
"""Seconds between two lines of one step where the output is not a terminal."""


class Step:
    """One step under way. `progress` may be called from any thread."""

    def __init__(self, report: Report, title: str) -> None:
        self.title = title
        self._report = report
        self._started = self._told = time.monotonic()
        self._task = report.live.add_task(title, total=None, left="") if report.live else None

    def progress(self, done: float, total: float, unit: str) -> None:
        """Say how far the step is.

        Args:
            done: How many are done.
            total: How many there are in all.
            unit: What is counted, e.g. "packages".
        """
        now = time.monotonic()
        spent = now - self._started
        left = ""
        if spent > 15 and 0 < done < total:
            seconds = spent / done * (total - done)
            left = f"about {max(1, round(seconds / 60))} min left" if seconds > 50 else "less than a minute left"
        text = f"{done:,.0f} of {total:,.0f} {unit}"
        if self._report.live:
            self._report.live.update(self._task, completed=min(done, total), total=total, left=f"{text}  {left}")
        elif now - self._told > QUIET_INTERVAL:
            self._told = now
            self._report.say(f"  {self.title}: {text}" + (f", {left}" if left else ""))

    def _end(self, mark: str) -> None:
        if self._report.live:
            self._report.live.remove_task(self._task)
        self._report.say(f"{mark} {self.title}  {time.monotonic() - self._started:.1f} s")


class Report:
    """Tells a person what the lab does.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._quiet = quiet
        self._steps = 0
        self._lock = threading.RLock()
        self.live: Progress | None = None

    def __call__(self, text: str) -> None:
        """Say one line."""
        self.say(text)

    def say(self, text: str) -> None:
        """Say one line."""
        if not self._quiet:
            with self._lock:
                (self.live.console if self.live else self._console).print(text, markup=False)

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Hold the lock at `path`; say so before waiting for whoever has it."""
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            self.say(f"Another `lab` command holds {path.name}; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """One step; its line appears with its duration when it ends. Steps may overlap, in threads."""
        with self._lock:
            self._steps += 1
            if self._steps == 1 and self._console.is_terminal and not self._quiet:
                self.live = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.fields[left]}"),
                    TimeElapsedColumn(),
                    console=self._console,
                    transient=True,
                )
                self.live.start()
            step = Step(self, title)
        try:
            yield step
        except BaseException:
            self._close(step, "✗")
            raise
        self._close(step, "✓")

    def _close(self, step: Step, mark: str) -> None:
        with self._lock:
            step._end(mark)
            self._steps -= 1
            if self._steps == 0 and self.live:
                self.live.stop()
                self.live = None
