"""A lab of its own, instance 9, beside whatever lab is up on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

INSTANCE = "9"
STATE = Path("/var/lib/by-experiment9")
CGROUPS = Path("/sys/fs/cgroup")
FREE_SUBNET = re.compile(r"10\.30\.\d+\.0/24 dev bx9")


@dataclass(frozen=True)
class Lab:
    """Runs `lab` as a person would, in an environment that belongs to these tests."""

    environment: dict[str, str] = field(
        default_factory=lambda: (
            {key: value for key, value in os.environ.items() if not key.startswith("LAB_") or key == "LAB_CACHE"}
            | {"LAB_INSTANCE": INSTANCE}
        )
    )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `lab` and return at once; both of its streams are in `stdout`."""
        return subprocess.Popen(
            [sys.executable, "-m", "lab", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**self.environment, **environment},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `lab` to its end."""
        process = self.start(*arguments, **environment)
        said, _ = process.communicate(timeout=300)
        assert "Traceback" not in said, said
        return subprocess.CompletedProcess(arguments, process.returncode, said)

    def well(self, *arguments: str, **environment: str) -> str:
        """Run `lab` and return what it said; it must succeed."""
        done = self(*arguments, **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def fails(self, *arguments: str, **environment: str) -> str:
        """Run `lab` and return the one line of its failure."""
        done = self(*arguments, **environment)
        assert done.returncode != 0, done.stdout
        complaints = [line for line in done.stdout.splitlines() if line.startswith("lab: ")]
        assert len(complaints) == 1, done.stdout
        return complaints[0]

    def rows(self) -> dict[str, dict]:
        """`lab status`, by the component's name."""
        return {row["name"]: row for row in json.loads(self("status", "--json").stdout)}

    def kubectl(self, *arguments: str) -> str:
        """What kubectl says; it must succeed."""
        return self.well("kubectl", *arguments)


def until(condition: Callable[[], object], limit: float, every: float = 0.2) -> object:
    """Wait until a condition holds, `limit` seconds at most, and return what it returned."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(every)
    return found


def traces() -> list[str]:
    """Everything on this machine that belongs to instance 9, the cache aside."""
    found = [str(path) for path in Path("/var/lib").glob(f"{STATE.name}*")]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if STATE.name in line or "/bx9" in line]
    found += [str(path) for path in Path("/sys/class/net").glob("bx9*")] + [str(path) for path in Path("/run/netns").glob("bx9*")]
    found += [str(path) for path in CGROUPS.glob(f"**/{STATE.name}") if path.is_dir()]
    found += FREE_SUBNET.findall(subprocess.run(["ip", "route"], capture_output=True, text=True).stdout)
    for process in psutil.process_iter():
        try:
            if process.environ().get("BY_EXPERIMENT_STATE") == str(STATE) or STATE.name in " ".join(process.cmdline()):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The command `lab` for instance 9; whatever it left is taken down at the end."""
    from lab import host

    if why_not := host.clusterless():
        pytest.skip(why_not.what)
    if not host.is_root():
        pytest.skip("These tests look into root's files and namespaces; run them as root.")
    lab = Lab()
    lab("down", "--force")
    yield lab
    lab("down", "--force")


@pytest.fixture
def up(lab: Lab) -> Lab:
    """The same with its cluster and brokers up."""
    lab.well("up")
    return lab
