"""The site, built from the stored outputs, and a real browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fresh build."""
    into = tmp_path_factory.mktemp("build")
    command = [sys.executable, "-m", "lab.book", "build", "--stored", "--into", str(into)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"The site was not built:\n{done.stdout}{done.stderr}", pytrace=False)
    return into / "html"


def find_browser() -> str:
    """The path of Chromium or Chrome; Debian's package is installed where that can be. Empty if there is none."""
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    become = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (become and subprocess.run([*become, "true"], capture_output=True).returncode):
        return ""
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        subprocess.run([*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet=2", *command], capture_output=True)
    return shutil.which("chromium") or ""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, which asks nobody for updates."""
    path = find_browser()
    if not path:
        pytest.skip("No browser: neither Chromium nor Chrome is here, and apt-get cannot install one.")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=[*OFFLINE, "--disable-gpu", *sandbox])
        yield browser
        browser.close()
