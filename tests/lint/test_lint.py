"""Style and spelling of everything in the checkout, code and prose."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "--diff", "."],
        ["codespell_lib"],
    ],
    ids=["ruff", "format", "spelling"],
)
def test_clean(command: list[str], pytestconfig: pytest.Config) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
