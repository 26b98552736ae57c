"""env/setup.sh: what it makes, what it leaves alone, and that every interruption is mended by the next run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEW = {"uv", "deno", "hatchling", "editables", "packaging", "pathspec", "pluggy", "trove-classifiers"}
"""Enough to install the lab itself and the JavaScript packages."""


def run(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "env/setup.sh"], cwd=checkout, capture_output=True, text=True, env={**os.environ, **variables})


def succeed(checkout: Path, **variables: str) -> str:
    done = run(checkout, **variables)
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [checkout / ".venv/bin/python", "-c", "import lab; print(lab.__file__)"], capture_output=True, text=True, cwd="/"
    )
    assert where.stdout.strip() == str(checkout / "env/lab/__init__.py"), where.stderr
    return done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with few requirements, in a folder whose name is hard on shell scripts."""
    place = tmp_path / "Büch er's"
    for folder in ("env/lab", "env/javascript"):
        (place / folder).mkdir(parents=True)
    for name in ("env/setup.sh", "env/pyproject.toml", "env/lab/__init__.py", "env/javascript/deno.json", "env/javascript/deno.lock"):
        shutil.copy(ROOT / name, place / name)
    entries = re.findall(r"^[^\s#].*\n(?:[ \t].*\n)*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    chosen = [entry for entry in entries if entry.split("==")[0] in FEW]
    assert len(chosen) == len(FEW)
    (place / "requirements.txt").write_text("".join(chosen))
    return place


def test_made_once_and_again_only_when_something_changes(checkout: Path) -> None:
    assert "Making" in succeed(checkout)
    assert succeed(checkout) == ""
    (checkout / "requirements.txt").write_text((checkout / "requirements.txt").read_text() + "# changed\n")
    assert "Updating" in succeed(checkout)
    assert succeed(checkout) == ""
    moved = checkout.rename(checkout.with_name("moved"))
    assert "Making" in succeed(moved)
    (moved / ".venv/bin/python").unlink()
    assert "Making" in succeed(moved)


def test_killed_at_any_moment(checkout: Path) -> None:
    for after in (0.1, 1.0, 2.5):
        process = subprocess.Popen(["sh", "env/setup.sh"], cwd=checkout, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(after)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    succeed(checkout)


def test_two_at_once(checkout: Path) -> None:
    both = [subprocess.Popen(["sh", "env/setup.sh"], cwd=checkout, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("Making" in text for text in said) == [False, True]
    assert succeed(checkout) == ""


def test_python_too_old_or_missing(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "/nowhere/python3"):
        done = run(checkout, PYTHON=python)
        assert done.returncode == 1
        assert done.stderr.startswith("Python 3.11 or newer is needed")
        assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_index_out_of_reach(checkout: Path, tmp_path: Path) -> None:
    done = run(checkout, PIP_INDEX_URL="http://127.0.0.1:1/", PIP_FIND_LINKS="", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "uv could not be installed: is the package index reachable?"
    assert not (checkout / ".venv/.made").exists()
