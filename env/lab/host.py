"""What the lab asks of the machine it runs on: rights, programs, kernel features, memory, disk, ports."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab import brokers, network, settings
from lab.errors import LabError, MissingPrerequisite, Occupied
from lab.report import Report

PACKAGES = {"runc": "runc", "nft": "nftables", "ip": "iproute2", "catatonit": "catatonit", "nsenter": "util-linux", "unshare": "util-linux"}
"""The Debian package of each program that the cluster needs and the lab does not build."""
MEMORY = 3.0
"""GB that must be available: the idle lab takes 1.8, the lessons' Pods the rest."""


def is_root() -> bool:
    """Whether this process may make namespaces."""
    return os.geteuid() == 0


def can_become_root() -> bool:
    """Whether sudo is there, and either asks nothing or can ask on this terminal."""
    if is_root():
        return True
    if not shutil.which("sudo"):
        return False
    return sys.stdin.isatty() or subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0


def clusterless() -> LabError | None:
    """Why no embedded cluster can run here at all, or None if one can. Takes no time."""
    if sys.platform != "linux":
        return MissingPrerequisite(
            f"The embedded cluster needs Linux; this is {platform.system()}.",
            "Name a cluster of your own with LAB_CLUSTER=context:NAME, or build the site from the stored outputs with `make site`.",
        )
    if not can_become_root():
        return MissingPrerequisite(
            "The embedded cluster needs root, or sudo, to make its namespaces.",
            "Run it as root, name a cluster of your own with LAB_CLUSTER=context:NAME, or build the site from the stored outputs with `make site`.",
        )
    return None


def missing_programs() -> list[str]:
    """The programs of PACKAGES that are not there."""
    return [name for name in PACKAGES if shutil.which(name) is None]


def install_programs(report: Report) -> None:
    """Install what PACKAGES names and the machine lacks, with apt (and sudo when not root).

    Raises:
        MissingPrerequisite: There is no apt, or it failed.
    """
    missing = missing_programs()
    if not missing:
        return
    packages = sorted({PACKAGES[name] for name in missing})
    if not shutil.which("apt-get"):
        raise MissingPrerequisite(
            f"This machine lacks {', '.join(missing)}.", f"Install what your system calls {', '.join(packages)} and run it again."
        )
    prefix = [] if is_root() else ["sudo"]
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    with report.step(f"Install {', '.join(packages)}"):
        for arguments in (["install"], ["update"], ["install"]):
            command = [
                *prefix,
                *environment,
                "apt-get",
                "-q",
                "-y",
                "--no-install-recommends",
                *arguments,
                *(packages if arguments == ["install"] else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL if is_root() else None)
            if arguments == ["install"] and done.returncode == 0:
                return
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise MissingPrerequisite(
            f"apt-get could not install {' '.join(packages)}: {lines[-1]}", f"Try `apt-get install {' '.join(packages)}` by hand."
        )


KUBELETS_TUNABLES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Kernel settings that a kubelet changes for the whole host (kubelet's setupKernelTunables); `lab down` puts them back."""


def tunables() -> dict[str, str]:
    """The present value of each of KUBELETS_TUNABLES."""
    return {name: Path("/proc/sys", name).read_text().strip() for name in KUBELETS_TUNABLES if Path("/proc/sys", name).exists()}


def restore_tunables(values: dict[str, str]) -> None:
    """Put back what `tunables` read."""
    for name, value in values.items():
        with contextlib.suppress(OSError):
            Path("/proc/sys", name).write_text(value)


def port_holder(address: str, port: int) -> str:
    """Who listens there: "" if nobody, else a name and a pid as far as this user may know them."""
    family = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with family:
        family.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            family.bind((address, port))
            return ""
        except OSError as error:
            if error.errno != 98:
                return ""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


@dataclass(frozen=True)
class Finding:
    """One line of `lab doctor`.

    Args:
        what: What was looked at.
        well: Whether it is as the lab needs it.
        found: What was found.
        cure: What to do, where it is not well.
    """

    what: str
    well: bool
    found: str
    cure: str = ""


def examine(*, running: bool) -> list[Finding]:
    """Look at everything the lab needs.

    Args:
        running: Whether a lab runs already, so that its ports and addresses are its own.
    """
    findings = []
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "") if sys.platform == "linux" else platform.system()
    why_not = clusterless()
    findings.append(
        Finding(
            "system",
            sys.platform == "linux",
            f"{system}, kernel {platform.release()}, {platform.machine()}",
            why_not.cure if why_not else "",
        )
    )
    findings.append(
        Finding(
            "rights",
            can_become_root(),
            "root" if is_root() else "sudo" if can_become_root() else "neither root nor sudo",
            "Brokers alone need no root; a cluster does.",
        )
    )
    missing = missing_programs()
    findings.append(
        Finding(
            "programs",
            not missing,
            f"lacks {', '.join(missing)}" if missing else ", ".join(PACKAGES),
            f"`lab up` installs them with apt; elsewhere install {', '.join(sorted({PACKAGES[name] for name in missing}))}.",
        )
    )
    findings += _kernel()
    available = psutil.virtual_memory().available / 1e9
    findings.append(
        Finding(
            "memory",
            running or available >= MEMORY,
            f"{available:.1f} GB available",
            f"The lab needs {MEMORY:.0f} GB; end something large.",
        )
    )
    place = next(folder for folder in (settings.cache(), *settings.cache().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    findings.append(
        Finding(
            "disk",
            free >= 3,
            f"{free:.1f} GB free at {place}",
            "The first build needs 8 GB for a while, a running lab 3 GB. Set LAB_CACHE to another disk.",
        )
    )
    if not running:
        taken = [f"{port} by {holder}" for address, port in brokers.ports(None) if (holder := port_holder(address, port))]
        findings.append(
            Finding(
                "ports",
                not taken,
                "; ".join(taken) if taken else f"{settings.BROKER_PORT} and the brokers' others are free",
                "End what holds them.",
            )
        )
        if shutil.which("ip"):
            try:
                findings.append(Finding("addresses", True, f"{network.free_subnet()} is free"))
            except Occupied as error:
                findings.append(Finding("addresses", False, error.what, error.cure))
    return findings


def _kernel() -> list[Finding]:
    if sys.platform != "linux":
        return []
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    if version == 2:
        controllers = set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())
    else:
        controllers = {path.name for path in Path("/sys/fs/cgroup").glob("*") if path.is_dir()}
    lacking = {"cpu", "cpuset", "memory", "pids"} - controllers
    release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in platform.release().split(".")[:2])
    return [
        Finding("kernel", release >= (5, 13), platform.release(), "kube-proxy's nftables mode needs Linux 5.13 or later."),
        Finding(
            "cgroups",
            not lacking,
            f"version {version}" + (f", without {', '.join(sorted(lacking))}" if lacking else ""),
            "Boot with these controllers on.",
        ),
        *(
            Finding(
                kind,
                Path("/proc/self/ns", kind).exists(),
                "there" if Path("/proc/self/ns", kind).exists() else "missing",
                "This kernel lacks a namespace.",
            )
            for kind in ("net", "mnt", "pid")
        ),
    ]


def require(*, cluster: bool, kafka: bool) -> None:
    """Raise for the first thing that keeps a lab from starting.

    Raises:
        MissingPrerequisite: Rights, a kernel feature, memory or disk are lacking.
        Occupied: A port is held by something else.
    """
    if cluster and (why_not := clusterless()):
        raise why_not
    for finding in examine(running=False):
        wanted = (
            finding.what in ("memory", "disk")
            or (cluster and finding.what not in ("ports", "rights"))
            or (kafka and finding.what == "ports")
        )
        if wanted and not finding.well:
            kind = Occupied if finding.what in ("ports", "addresses") else MissingPrerequisite
            raise kind(f"{finding.what.capitalize()}: {finding.found}.", finding.cure)
