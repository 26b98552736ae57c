"""Which notebooks can run here, and the lab under them: `--nbval` compares every cell with its stored output."""

from __future__ import annotations

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
        broken: What `lab up` said when it failed, or "".
    """

    offers: frozenset[str]
    lacking: str = ""
    broken: str = ""


def run_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `lab` with `arguments`; both of its streams are in `stdout`."""
    return subprocess.run([sys.executable, "-m", "lab", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


GROUND = pytest.StashKey[Ground]()


def ground(config: pytest.Config) -> Ground:
    """Bring the lab up once, with all that can run here; what was not up before is taken down at the end."""
    if GROUND not in config.stash:
        doctor = run_lab("doctor", "--quick")
        was_up = run_lab("status", "--json").stdout.strip() not in ("", "[]")
        up = run_lab("up", *(["--no-cluster"] if doctor.returncode else []))
        if not was_up:
            config.add_cleanup(lambda: run_lab("down"))
        config.stash[GROUND] = Ground(
            offers=frozenset(["brokers"] if doctor.returncode else ["cluster", "brokers"]),
            lacking=doctor.stdout.strip().removeprefix("lab: "),
            broken=up.stdout.strip() if up.returncode else "",
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
        pytest.skip(f"{item.path.relative_to(item.config.rootpath)} needs the {' and the '.join(needs - found.offers)}. {found.lacking}")
    if found.broken and item.cell_num == 0:
        pytest.fail(f"The lab did not come up:\n{found.broken}", pytrace=False)
    elif found.broken:
        pytest.skip("The lab did not come up: see the first cell.")


@pytest.fixture(scope="session")
def lab_ground(request: pytest.FixtureRequest) -> Ground:
    """The lab, up, for tests that use it and leave it as it is."""
    return ground(request.config)
