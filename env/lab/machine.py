"""A machine of the cluster: Linux namespaces with a root file system, a network cable and a supervisord of their own.

What kind does with a Docker container, done with `unshare` and `pivot_root`: processes on it find `/etc/kubernetes`,
`/var/lib/kubelet` and `/run/containerd` where the upstream documentation puts them. Ending its PID 1 is a power cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab import network, settings
from lab.supervise import Program, Supervisor

INIT = Path(__file__).with_name("machine-init")
CGROUPS = Path("/sys/fs/cgroup")
SUPERVISOR_INSIDE = Path("/var/supervisor")
HOST_FILES = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "localtime", "protocols", "services")


@dataclass(frozen=True)
class Machine:
    """One machine.

    Args:
        name: Its host name, e.g. "node-1".
        address: Its address on the lab's bridge.
        folder: Where its `etc` and `var` lie on the host.
    """

    name: str
    address: str
    folder: Path

    @property
    def etc(self) -> Path:
        """Its `/etc`, on the host."""
        return self.folder / "etc"

    @property
    def supervisor(self) -> Supervisor:
        """The supervisord that is its PID 1."""
        return Supervisor(self.folder / "var" / "supervisor")

    def install(self, programs: Iterable[Program], owner: tuple[int, int]) -> None:
        """Lay out `/etc` and `/var` and write the supervisor's configuration.

        Args:
            programs: What runs on the machine.
            owner: The user and group id that may control them.
        """
        self.etc.mkdir(parents=True, exist_ok=True)
        self.supervisor.folder.mkdir(parents=True, exist_ok=True)
        for name in HOST_FILES:
            source = Path("/etc", name)
            if source.exists():
                (self.etc / name).write_bytes(source.read_bytes())
        (self.etc / "hostname").write_text(self.name + "\n")
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (self.etc / "resolv.conf").write_text("")
        self.supervisor.write(programs, owner, seen_as=SUPERVISOR_INSIDE)

    def program(self, binaries: Path) -> Program:
        """The program that, run on the host, is this machine.

        Args:
            binaries: The folder that the machine sees as `/opt/bin`.
        """
        interpreter = [Path(sys.prefix), Path(sys.base_prefix)]
        return Program(
            name=self.name,
            command=(
                "nsenter",
                f"--net={network.NAMESPACES / network.namespace(self.name)}",
                "unshare",
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child=KILL",
                "/bin/sh",
                str(INIT),
                settings.FULL_NAME,
                self.name,
                str(self.folder),
                str(binaries),
                sys.executable,
                *(str(path) for path in interpreter if not path.is_relative_to("/usr")),
            ),
            priority=10,
            stop_signal="KILL",
        )


def cgroups(name: str = "") -> list[Path]:
    """Every cgroup folder of the lab, or of one of its machines, deepest first, in every hierarchy."""
    roots = [CGROUPS] if (CGROUPS / "cgroup.controllers").exists() else sorted(CGROUPS.glob("*"))
    found: list[Path] = []
    for root in dict.fromkeys(path.resolve() for path in roots):
        top = root / settings.FULL_NAME / name
        found += [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]
    return found
