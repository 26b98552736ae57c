"""A Docker engine of the tests' own: Debian's packages, unpacked beside the system, in namespaces that end with the tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lab import host, settings

PACKAGES = ("docker.io", "docker-compose")
CGROUP = "by-experiment-docker"
FOLLOWS_USR = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True)
class Docker:
    """A Docker engine in network, mount and process namespaces of its own.

    Args:
        pid: Its process.
        socket: Where it answers.
    """

    pid: int
    socket: Path

    def __call__(self, *command: str | Path, limit: float = 300, **environment: str) -> str:
        """Run a command where the engine, its containers' published ports and Debian's Docker are; what it said."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", "--mount", *command],
            env={**os.environ, "DOCKER_HOST": f"unix://{self.socket}", **environment},
            capture_output=True,
            text=True,
            timeout=limit,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, program: str, *arguments: str, **environment: str) -> str:
        """Run a Python program with the book's own packages there."""
        return self(sys.executable, "-c", program, *arguments, **environment)


def _unpacked() -> Path:
    """Debian's packages of Docker that this machine lacks, unpacked into the cache. Nothing is installed."""
    root = settings.cache() / "tests-docker"
    if root.exists():
        return root
    if not shutil.which("apt-get"):
        pytest.skip("There is no Docker engine to be had: this system has no apt-get.")
    draft, packages = root.with_suffix(".new"), root.with_suffix(".packages")
    for folder in (draft, packages):
        shutil.rmtree(folder, ignore_errors=True)
    (packages / "partial").mkdir(parents=True)
    fetch = ["apt-get", "-q", "-y", "--no-install-recommends", "-o", f"Dir::Cache::archives={packages}", "--download-only", "install"]
    for command in ([*fetch, *PACKAGES], ["apt-get", "-q", "update"], [*fetch, *PACKAGES]):
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.returncode and command[-1] in PACKAGES:
            break
    else:
        pytest.skip(f"Debian's packages {' and '.join(PACKAGES)} cannot be had here: {done.stderr.strip()[-200:]}")
    for name in FOLLOWS_USR:
        (draft / "usr" / name).mkdir(parents=True)
        (draft / name).symlink_to(f"usr/{name}")
    for package in packages.glob("*.deb"):
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
        subprocess.run(["tar", "--extract", "--keep-directory-symlink", f"--directory={draft}"], input=content, check=True)
    for name in ("iptables", "ip6tables"):
        if (draft / "usr/sbin/xtables-nft-multi").exists():
            (draft / "usr/sbin" / name).unlink(missing_ok=True)
            (draft / "usr/sbin" / name).symlink_to("xtables-nft-multi")
    shutil.rmtree(packages)
    draft.rename(root)
    return root


START = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$1/usr:/usr" /usr
[ ! -d /run/containerd ] || mount -t tmpfs tmpfs /run/containerd
ip link set lo up
exec dockerd --data-root="$2/data" --exec-root="$2/exec" --pidfile="$2/pid" --host="unix://$2/docker.sock" \
    --cgroup-parent="$3" --exec-opt=native.cgroupdriver=cgroupfs
"""
"""It hides the machine's own containerd, which Docker's engine would use, and asks systemd, where there is one, for nothing."""


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    if not host.is_root():
        pytest.skip("A Docker engine of the tests' own needs root.")
    unpacked = _unpacked()
    folder = Path(tmp_path_factory.mktemp("docker"))
    socket = folder / "docker.sock"
    with (folder / "log").open("wb") as log:
        namespaces = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", START, "sh", unpacked, folder, CGROUP],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > end:
                pytest.skip(f"Docker's engine does not run here: {(folder / 'log').read_text(errors='replace').strip()[-300:]}")
            time.sleep(0.1)
        engine = Docker(psutil.Process(process.pid).children()[0].pid, socket)
        engine("/usr/bin/docker", "info")
        yield engine
    finally:
        if children := psutil.Process(process.pid).children() if process.poll() is None else []:
            children[0].send_signal(signal.SIGTERM)
            psutil.wait_procs(children, timeout=30)
        process.kill()
        process.wait()
        cgroups = Path("/sys/fs/cgroup")
        for left in (*cgroups.glob(CGROUP), *cgroups.glob(f"*/{CGROUP}")):  # Of version 2, and of version 1.
            left.rmdir()
        shutil.rmtree(folder, ignore_errors=True)
