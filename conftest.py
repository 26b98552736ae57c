"""Which notebooks can run here, and the lab under them: `--nbval` compares every cell with its stored output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
"""Of two kernels named python3, the environment's own is taken, not the user's."""


def execute_as_jupyter_does(kernel: RunningKernel, source: str, allow_stdin: bool | None = None) -> str:
    """Execute a cell with history: nbval does without, and then IPython prints what a `;` at the end should silence."""
    return kernel.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


RunningKernel.execute_cell_input = execute_as_jupyter_does


@dataclass(frozen=True)
class Ground:
    """What notebooks can stand on here.

    Args:
        offers: "cluster", "brokers".
        lacking: Why there is no cluster, in one line, or "".
        up: Whether the lab came up.
    """

    offers: frozenset[str]
    lacking: str
    up: bool


LAB = (sys.executable, "-m", "lab")
GROUND = pytest.StashKey[Ground]()


def ground(config: pytest.Config) -> Ground:
    """Bring the lab up once, in sight, with all that can run here; what was not up before is taken down at the end."""
    if GROUND not in config.stash:
        doctor = subprocess.run([*LAB, "doctor", "--quick"], capture_output=True, text=True)
        running = json.loads(subprocess.run([*LAB, "status", "--json"], capture_output=True, text=True).stdout or "[]")
        without = {"cluster"} if doctor.returncode else set()
        if running and not any(row["name"].startswith("broker-") for row in running):
            without.add("brokers")
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(flush=True)
            up = subprocess.run([*LAB, "up", *(f"--no-{what}" for what in sorted(without))])
        if not running:
            config.add_cleanup(lambda: subprocess.run([*LAB, "down"], capture_output=True))
        config.stash[GROUND] = Ground(
            offers=frozenset({"cluster", "brokers"} - without),
            lacking=doctor.stderr.strip().removeprefix("lab: "),
            up=up.returncode == 0,
        )
    return config.stash[GROUND]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before a notebook's cell, and so before its kernel: bring up what the notebook needs, or skip it with the reason."""
    if not isinstance(item, IPyNbCell):
        return
    needs = set(item.parent.nb.metadata.get("lab", {}).get("needs", []))
    if not needs:
        return
    found = ground(item.config)
    if needs - found.offers:
        lacking = found.lacking or "The lab that is up has none."
        pytest.skip(f"{item.path.relative_to(item.config.rootpath)} needs the {' and the '.join(needs - found.offers)}. {lacking}")
    if not found.up and item.cell_num == 0:
        pytest.fail("The lab did not come up; what it said stands where it was started.", pytrace=False)
    elif not found.up:
        pytest.skip("The lab did not come up.")
