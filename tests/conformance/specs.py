"""Which of Kubernetes' specs are run, and what came of them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SELECTION = Path(__file__).with_name("specs.toml")
ELSEWHERE = "Not taught here"
"""The area of specs of no area of the book's: run only where FOCUS names them."""


@dataclass(frozen=True)
class Spec:
    """One test of the suite.

    Args:
        name: Its full name.
        labels: Its labels.
        state: What came of it, in Ginkgo's words: "passed", "skipped" …; "" before the run.
        seconds: How long it took.
        message: Why it failed or was skipped, its first line.
    """

    name: str
    labels: frozenset[str] = frozenset()
    state: str = ""
    seconds: float = 0.0
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether it was run and did not hold."""
        return self.state not in ("", "passed", "skipped", "pending", "interrupted")


def read(report: Path) -> list[Spec]:
    """The specs of a JSON report of Ginkgo's, set-up and clean-up nodes only where they failed."""
    found = []
    for suite in json.loads(report.read_text()):
        for told in suite["SpecReports"] or []:
            texts = [*(told["ContainerHierarchyTexts"] or []), told["LeafNodeText"]]
            labels = [label for group in (told["ContainerHierarchyLabels"] or []) for label in group or []]
            lines = told.get("Failure", {}).get("Message", "").strip().splitlines() or [""]
            spec = Spec(
                name=" ".join(filter(None, texts)) or told["LeafNodeType"],
                labels=frozenset([*labels, *(told["LeafNodeLabels"] or [])]),
                state=told["State"],
                seconds=told["RunTime"] / 1e9,
                message=lines[0],
            )
            if told["LeafNodeType"] == "It" or spec.failed:
                found.append(spec)
    return found


@dataclass(frozen=True)
class LeftOut:
    """A spec that is not run.

    Args:
        name: Its full name.
        why: The reason.
        image: The image that it would need from the internet, or "".
    """

    name: str
    why: str
    image: str = ""


class Selection:
    """What `specs.toml` says.

    Args:
        text: Its text.
    """

    def __init__(self, text: str) -> None:
        told = tomllib.loads(text)
        self._any, self._none = set(told["labels"]["any"]), set(told["labels"]["none"])
        self._areas = {area: re.compile(pattern) for area, pattern in told["areas"].items()}
        self._left_out = told.get("left_out", [])

    def area(self, name: str) -> str:
        """The area of a spec."""
        return next((area for area, pattern in self._areas.items() if pattern.search(name)), ELSEWHERE)

    def of(self, specs: Iterable[Spec], focus: str = "") -> tuple[list[Spec], list[LeftOut]]:
        """The specs to run, and those of the same areas that are left out.

        Args:
            specs: All that the suite has.
            focus: A pattern of the person's; with it, any area counts.

        Raises:
            ValueError: A pattern of the file fits no spec, or two fit the same spec.
        """
        specs = list(specs)
        fitting = [
            spec
            for spec in specs
            if spec.labels & self._any and not spec.labels & self._none and not any(label.startswith("Feature:") for label in spec.labels)
        ]
        idle = [area for area, pattern in self._areas.items() if not any(pattern.search(spec.name) for spec in fitting)]
        idle += [entry["match"] for entry in self._left_out if not any(re.search(entry["match"], spec.name) for spec in fitting)]
        if idle:
            raise ValueError(f"{SELECTION.name}: nothing fits {', '.join(idle)}.")
        chosen, left_out = [], []
        for spec in fitting:
            if not (re.search(focus, spec.name) if focus else self.area(spec.name) != ELSEWHERE):
                continue
            entries = [entry for entry in self._left_out if re.search(entry["match"], spec.name)]
            if len(entries) > 1:
                raise ValueError(f"{SELECTION.name}: {spec.name} is left out twice.")
            if entries:
                left_out.append(LeftOut(spec.name, entries[0]["why"], entries[0].get("image", "")))
            else:
                chosen.append(spec)
        return chosen, left_out


def pattern(specs: Iterable[Spec]) -> str:
    """A regular expression of Go's that fits these specs and no others."""
    return f"({'|'.join(sorted(re.escape(spec.name) for spec in specs))})$"


@dataclass(frozen=True)
class Row:
    """What came of one area.

    Args:
        area: Its name.
        passed: How many specs held.
        failed: How many did not.
        left_out: How many were not run.
        seconds: How long its specs took in all; they overlap.
    """

    area: str
    passed: int
    failed: int
    left_out: int
    seconds: float


def rows(selection: Selection, ran: Iterable[Spec], left_out: Iterable[LeftOut]) -> list[Row]:
    """One row per area that has any spec, in the file's order."""
    ran, left_out = list(ran), list(left_out)
    order = [*selection._areas, ELSEWHERE]
    found = []
    for area in order:
        here = [spec for spec in ran if selection.area(spec.name) == area]
        out = sum(selection.area(one.name) == area for one in left_out) + sum(spec.state in ("skipped", "pending") for spec in here)
        passed, failed = sum(spec.state == "passed" for spec in here), sum(spec.failed for spec in here)
        if passed or failed or out:
            found.append(Row(area, passed, failed, out, sum(spec.seconds for spec in here)))
    return found
