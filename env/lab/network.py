"""The lab's network: one bridge in a namespace of its own, a cable to each machine, and one to the host.

The host sees a single interface with one small subnet. The bridge is not on the host, so a firewall there
that filters bridged frames (Docker's, for one) has no say in it, and nothing is forwarded to the outside or from there.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import subprocess
from pathlib import Path

from lab import settings
from lab.errors import MissingPrerequisite, Occupied

PREFIX = f"bx{settings.INSTANCE}-"
HOST_LINK = f"bx{settings.INSTANCE or 0}"
SWITCH = PREFIX + "switch"
NAMESPACES = Path("/run/netns")
FIREWALL = f"inet {settings.FULL_NAME}"
"""The host's nftables table that keeps strangers from the lab's addresses."""


def address(subnet: str, host: int) -> str:
    """The address of number `host` in `subnet`: 1 the host, 2 the control plane, 11 and up the nodes."""
    return str(ipaddress.ip_network(subnet)[host])


def namespace(machine: str) -> str:
    """The name of the machine's network namespace."""
    return PREFIX + machine


def service_addresses(subnet: str) -> str:
    """The last quarter of `subnet`: addresses for Services of type LoadBalancer."""
    return str(list(ipaddress.ip_network(subnet).subnets(prefixlen_diff=2))[-1])


def free_subnet() -> str:
    """The first candidate of `settings.SUBNETS` that no route of the host touches.

    Raises:
        Occupied: All of them are in use.
    """
    listed = subprocess.run(["ip", "-json", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True).stdout
    routed = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(listed or "[]")
        if route["dst"] != "default" and route.get("dev") != HOST_LINK
    ]
    for candidate in settings.SUBNETS:
        if not any(ipaddress.ip_network(candidate).overlaps(network) for network in routed):
            return candidate
    raise Occupied(
        f"Every address range that the lab could use for its bridge ({settings.SUBNETS[0]} to {settings.SUBNETS[-1]}) is routed elsewhere.",
        "Free one of them; `ip route` shows who uses it.",
    )


def _batch(lines: list[str], inside: str | None = None) -> None:
    where = ["-n", inside] if inside else []
    done = subprocess.run(["ip", *where, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode:
        raise MissingPrerequisite(
            f"The kernel refused a part of the lab's network: {done.stderr.strip().splitlines()[0].rstrip('.')}.",
            "The lab needs network namespaces, bridges and veth pairs.",
        )


def _shut(subnet: str) -> None:
    """Let nobody but the host itself and the lab's machines reach the lab's addresses.

    Linux answers for an address of its own on every link, so that a neighbour (another machine, a container) who routes the
    subnet to this host would reach the brokers' listener for Pods, which asks for no password.
    """
    rules = f"""table {FIREWALL} {{
        chain input {{
            type filter hook input priority filter; policy accept;
            iifname != {{ "lo", "{HOST_LINK}" }} ip daddr {subnet} drop
        }}
        chain forward {{
            type filter hook forward priority filter; policy accept;
            iifname != "{HOST_LINK}" oifname "{HOST_LINK}" drop
        }}
    }}"""
    done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True)
    if done.returncode:
        raise MissingPrerequisite(
            f"The kernel refused the lab's firewall: {done.stderr.strip().splitlines()[0].rstrip('.')}.", "The lab needs nftables."
        )


def up(subnet: str, machines: dict[str, str], pod_subnets: dict[str, str]) -> None:
    """Make the bridge, the host's cable, each machine's namespace and cable, and the host's route to LoadBalancer addresses: any node.

    Args:
        subnet: The bridge's subnet.
        machines: Address of each machine by its name.
        pod_subnets: Pod subnet of each node by its machine's name; every other machine routes it there.

    Raises:
        MissingPrerequisite: The kernel lacks a feature.
    """
    length = ipaddress.ip_network(subnet).prefixlen
    _shut(subnet)
    _batch(
        [
            f"netns add {SWITCH}",
            *(f"netns add {namespace(name)}" for name in machines),
            f"link add {HOST_LINK} type veth peer name host netns {SWITCH}",
            f"addr add {address(subnet, 1)}/{length} dev {HOST_LINK}",
            f"link set {HOST_LINK} up",
        ]
    )
    cables = {name: f"to-{name}"[:15] for name in machines}
    _batch(
        [
            "link add bridge type bridge",
            "link set bridge up",
            "link set host master bridge up",
            *(f"link add {cable} type veth peer name eth0 netns {namespace(name)}" for name, cable in cables.items()),
            *(f"link set {cable} master bridge up" for cable in cables.values()),
        ],
        inside=SWITCH,
    )
    for name, own in machines.items():
        _batch(
            [
                "link set lo up",
                f"addr add {own}/{length} dev eth0",
                "link set eth0 up",
                f"route add default via {address(subnet, 1)}",
                *(f"route add {pods} via {machines[node]}" for node, pods in pod_subnets.items() if node != name),
            ],
            inside=namespace(name),
        )
    hops = " ".join(f"nexthop via {machines[node]}" for node in pod_subnets)
    _batch([f"route add {service_addresses(subnet)} {hops}"])


def down() -> None:
    """Remove every namespace, link and rule of the lab, whoever made them. Does nothing where there are none."""
    names = sorted(path.name for path in NAMESPACES.glob(PREFIX + "*")) if NAMESPACES.is_dir() else []
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    if names and not any(NAMESPACES.iterdir()):
        subprocess.run(["umount", str(NAMESPACES)], capture_output=True, check=False)
        with contextlib.suppress(OSError):
            NAMESPACES.rmdir()
    subprocess.run(["ip", "link", "delete", HOST_LINK], capture_output=True, check=False)
    subprocess.run(["nft", "delete", "table", *FIREWALL.split()], capture_output=True, check=False)
