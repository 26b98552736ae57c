"""Every path, version, address and environment variable of the lab, in one place."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lab.errors import LabError

NAME = "by-experiment"

INSTANCE = os.environ.get("LAB_INSTANCE", "")
"""Tells labs on one machine apart, e.g. "2": a lab of another instance has its own state, links, cgroups and ports. Usually empty."""
if INSTANCE and INSTANCE not in set("123456789"):
    raise SystemExit(f"lab: LAB_INSTANCE={INSTANCE!r} is not understood. Leave it unset, or write one digit from 1 to 9.")
FULL_NAME = NAME + INSTANCE

KUBERNETES = "1.37.2"
CONTAINERD = "2.4.2"
KAFKA = "4.4.0"

ENV = Path(__file__).resolve().parent.parent
"""The folder `env/` of this checkout."""
CHECKOUT = ENV.parent

ADMIN_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where Debian keeps nft and others, which is not on everybody's PATH."""

BROKER_PORT = 19092 + 1000 * int(INSTANCE or 0)
"""Loopback port of broker 1; brokers 2 and 3 follow. The controllers' ports are 100 above, the Pods' 200 above."""
BROKER_IDS = (1, 2, 3)

SUBNETS = tuple(f"10.30.{third}.0/24" for third in range(0, 250, 10))
"""Candidates for the lab's own bridge; the first one that the host does not route is taken."""
POD_CIDR = "10.244.0.0/16"
SERVICE_CIDR = "10.96.0.0/16"
DNS_ADDRESS = "10.96.0.10"
MAX_NODES = 5

READ = ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "KUBECONFIG")
"""What `environment` keeps, beside every variable that begins with LAB_."""


def cache() -> Path:
    """The folder that `lab down --purge` empties: binaries, jars, images (`LAB_CACHE` overrides it)."""
    if override := os.environ.get("LAB_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME


SYSTEM_STATE = Path("/var/lib") / FULL_NAME
"""State of a lab started by root. Short: Unix sockets live below it, and their paths end at 107 bytes."""


def user_state() -> Path:
    """State of a lab without root: brokers only."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / FULL_NAME


def state() -> Path:
    """The state folder that a command started by this user works on."""
    return SYSTEM_STATE if os.geteuid() == 0 else user_state()


def owner() -> tuple[int, int]:
    """The user and group id of the person: under sudo, the one who typed it."""
    return int(os.environ.get("SUDO_UID") or os.getuid()), int(os.environ.get("SUDO_GID") or os.getgid())


def environment() -> dict[str, str]:
    """What the lab reads of the person's environment. Beside PATH its processes get nothing else: a TMPDIR or a proxy is not theirs."""
    return {name: value for name, value in os.environ.items() if name.startswith("LAB_") or name in READ}


@dataclass(frozen=True)
class Own:
    """What the environment names.

    Args:
        cluster: A kubeconfig context, or "".
        brokers: Bootstrap servers, comma-separated, or "".
    """

    cluster: str
    brokers: str


def own() -> Own:
    """What LAB_CLUSTER and LAB_BROKERS name.

    Raises:
        LabError: One of them is not of its form.
    """
    told = os.environ.get("LAB_CLUSTER", "").strip()
    kind, _, context = told.partition(":")
    if told and (kind != "context" or not context):
        raise LabError(
            f"LAB_CLUSTER={told!r} is not understood.",
            "Write LAB_CLUSTER=context:NAME, with a name that `kubectl config get-contexts` lists.",
        )
    servers = [server.strip() for server in os.environ.get("LAB_BROKERS", "").split(",") if server.strip()]
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
            raise LabError(f"LAB_BROKERS: {server!r} is not a bootstrap server.", "Write LAB_BROKERS=host:port,host:port.")
    return Own(context, ",".join(servers))


@dataclass
class Lab:
    """What is written down about a running lab, in `lab.json` of its state folder.

    Args:
        checkout: The checkout that started it.
        state: Its state folder.
        cache: The cache folder whose binaries it runs.
        subnet: The bridge's subnet, or "" for a lab of brokers only.
        nodes: Names of the worker nodes.
        kubeconfig: Path of the administrator's kubeconfig, or "".
        bootstrap: Bootstrap servers as seen from the notebook, comma-separated, or "".
        bootstrap_pods: The same brokers as seen from a Pod, or "".
        started: Unix time in seconds.
    """

    checkout: str
    state: str
    cache: str
    subnet: str = ""
    nodes: list[str] = field(default_factory=list)
    kubeconfig: str = ""
    bootstrap: str = ""
    bootstrap_pods: str = ""
    started: float = 0.0

    def save(self) -> None:
        """Write `lab.json` at once or not at all."""
        target = Path(self.state) / "lab.json"
        draft = target.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self), indent=2))
        draft.chmod(0o644)
        draft.replace(target)


def find() -> Lab | None:
    """The lab of this machine that this user can reach, or None: the system's first, then the user's own."""
    for place in (SYSTEM_STATE, user_state()):
        try:
            lab = Lab(**json.loads((place / "lab.json").read_text()))
            told = (lab.checkout, lab.state, lab.cache, lab.subnet, lab.kubeconfig, lab.bootstrap, lab.bootstrap_pods, *lab.nodes)
        except (OSError, ValueError, TypeError):
            continue
        if all(isinstance(one, str) for one in told):
            return lab
    return None
