"""A lab of its own, instance 9, beside whatever lab is up on this machine, and what of it is left there."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

INSTANCE = os.environ.get("LAB_TEST_INSTANCE", "9")
STATE = Path(f"/var/lib/by-experiment{INSTANCE}")
LINK = f"bx{INSTANCE}"
"""What the names of the lab's links and network namespaces begin with."""
PORT = 19092 + 1000 * int(INSTANCE)
CGROUPS = Path("/sys/fs/cgroup")
OTHERS = re.compile(rf"by-experiment(?!{INSTANCE})|\bbx(?!{INSTANCE})\d|/by-experiment/")
"""What belongs to labs beside this one, or to the cache."""


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
    """Everything on this machine that belongs to the tests' lab, the cache aside."""
    found = [str(path) for path in Path("/var/lib").glob(f"{STATE.name}*")]
    found += [str(path) for path in Path("/sys/class/net").glob(f"{LINK}*")] + [str(path) for path in Path("/run/netns").glob(f"{LINK}*")]
    found += [str(path) for path in CGROUPS.glob(f"**/{STATE.name}") if path.is_dir()]
    found += [line for line in _said("ip", "-o", "route", "show", "table", "all") if f"dev {LINK}" in line]
    for process in psutil.process_iter():
        try:
            where = Path(f"/proc/{process.pid}")
            own = process.environ().get("BY_EXPERIMENT_STATE") == str(STATE) or STATE.name in " ".join(process.cmdline())
            # A container knows neither; it sits in a cgroup of the lab's, and its root file system comes from the state folder.
            if own or any(f"/{STATE.name}/" in (where / name).read_text() for name in ("cgroup", "mountinfo")):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except (psutil.Error, OSError):
            continue
    return found


VOLATILE = re.compile(
    r"kernel/random/|fs/quota/|kernel/ns_last_pid|kernel/pty/nr|fs/(dentry-state|inode-nr|inode-state|file-nr|aio-nr)|nf_conntrack_count"
    r"|/(conf|neigh)/|debug/|fs/binfmt_misc/|vm/(stat_refresh|compact_memory)|/flush$"
)
"""Kernel settings that count something, or belong to one link."""


def machine() -> dict[str, set[str]]:
    """The state of this machine that a lab could change: what is the same before `lab up` and after `lab down`."""
    from lab import host

    tree = {"/etc": 9, "/run": 2, "/var/lib": 1, "/var/log": 1, "/opt": 2, "/dev/shm": 1, "/root": 1, "/usr/local": 3, "/sys/fs/bpf": 2}
    settings = [path for path in Path("/proc/sys").rglob("*") if not VOLATILE.search(str(path)) and path.is_file()]
    if any(path.parent != STATE for path in Path("/var/lib").glob("by-experiment*/tunables.json")):
        settings = [path for path in settings if str(path.relative_to("/proc/sys")) not in host.KUBELETS_TUNABLES]
    found = {
        "mounts": {line.partition(" ")[2].partition(" ")[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "links": {path.name for path in Path("/sys/class/net").iterdir()},
        "routes": {line for family in ("-4", "-6") for line in _said("ip", "-o", family, "route", "show", "table", "all")},
        "rules": set(_said("ip", "rule")),
        "firewall": set(re.split(r"\n(?=table )", "\n".join(_said("nft", "list", "ruleset")))) - {""},
        "settings": {f"{path} {_content(path)}" for path in settings},
        "cgroups": {folder for folder, _, _ in os.walk(CGROUPS)},
        "loop devices": {f"{path} {_content(path)}" for path in Path("/sys/block").glob("loop*/loop/backing_file")},
        "files": {_file(path) for top, depth in tree.items() for path in _below(Path(top), depth)},
        "scratch": {str(path) for path in Path("/tmp").iterdir() if path.name.startswith("lab-")} | set(_java_files()),
    }
    return {kind: {one for one in entries if not OTHERS.search(one)} for kind, entries in found.items()}


def changed(before: dict[str, set[str]], patience: float = 0) -> list[str]:
    """What of `machine` is another than it was, a line each; what goes by itself within `patience` seconds is somebody else's doing."""
    end = time.monotonic() + patience
    while True:
        after = machine()
        found = [f"{kind}: - {one}" for kind in before for one in sorted(before[kind] - after[kind])]
        found += [f"{kind}: + {one}" for kind in before for one in sorted(after[kind] - before[kind])]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(1)


def _said(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _below(top: Path, depth: int) -> Iterator[Path]:
    """What lies in a folder, `depth` levels down."""
    try:
        entries = list(os.scandir(top))
    except OSError:
        return
    for entry in entries:
        yield Path(entry.path)
        if depth > 1 and entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), depth - 1)


def _file(path: Path) -> str:
    """A path; in /etc, what it holds as well, by size and time."""
    try:
        told = path.lstat()
    except OSError:
        return str(path)
    return f"{path} {told.st_size} {told.st_mtime_ns}" if path.is_relative_to("/etc") and stat.S_ISREG(told.st_mode) else str(path)


def _java_files() -> Iterator[str]:
    """Files that a JVM made in /tmp and, killed, has left there."""
    for path in Path("/tmp").glob("hsperfdata_*/*"):
        if path.name.isdigit() and not psutil.pid_exists(int(path.name)):
            yield str(path)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The command `lab` for the tests' instance; whatever it left is taken down at the end."""
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
