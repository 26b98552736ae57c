"""What runs: each component, node, broker and add-on, its version, age, memory and address."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from lab import addons, cluster, lifecycle, settings
from lab.errors import NotRunning
from lab.supervise import Supervisor

VERSIONS = {"containerd": settings.CONTAINERD} | dict.fromkeys(
    ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"), settings.KUBERNETES
)


API_SECONDS = 3
"""How long `lab status` waits for an API server that is there and says nothing."""


DISKS = {"etcd": "var/lib/etcd", "containerd": "var/lib/containerd"}
"""Where on its machine a component keeps what grows."""
SPARE = 8 << 20
"""Bytes below which a disk is called full: etcd and Kafka write megabytes at a time."""


@dataclass(frozen=True)
class Row:
    """One line of `lab status`.

    Args:
        name: The component, e.g. "node-1/kubelet", "broker-2" or "addon/storage".
        state: "running", or what it is instead.
        version: Its version.
        age: Seconds since it started.
        memory: Resident bytes of its process.
        address: Where it listens or lives.
    """

    name: str
    state: str
    version: str = ""
    age: float = 0.0
    memory: int = 0
    address: str = ""

    def as_dict(self) -> dict:
        """The row for JSON."""
        return asdict(self)


def _rows(
    prefix: str, supervisor: Supervisor, addresses: dict[str, str], versions: dict[str, str], processes: dict[str, psutil.Process]
) -> list[Row]:
    rows = []
    for told in supervisor.processes():
        process = processes.get(told["name"])
        try:
            memory = process.memory_info().rss if process else 0
        except psutil.Error:
            memory = 0
        name = told["name"]
        running = told["statename"] == "RUNNING"
        rows.append(
            Row(
                f"{prefix}{name}",
                "running" if running else told["statename"].lower(),
                versions.get(name, ""),
                time.time() - told["start"] if running else 0.0,
                memory,
                addresses.get(name, ""),
            )
        )
    return rows


def collect() -> list[Row]:
    """Every component of the running lab; empty when none is up."""
    lab = settings.find()
    if lab is None:
        return []
    state = Path(lab.state)
    control = lifecycle.supervisor(state)
    if not control.running() and lifecycle.alive(state):
        return [Row("lab", f"up, but not yours: {lab.checkout}", address=lab.state)]
    if not control.running():
        return [Row("lab", "dead: its processes are gone; `lab up` starts it again", address=lab.state)]
    machines = cluster.machines(state, lab.subnet, lab.nodes) if lab.subnet else []
    versions = VERSIONS | {"etcd": _etcd_version(Path(lab.cache))} | {f"broker-{number}": settings.KAFKA for number in settings.BROKER_IDS}
    ports = dict(zip((f"broker-{number}" for number in settings.BROKER_IDS), lab.bootstrap.split(","), strict=False))
    on_host = {told["name"]: told["pid"] for told in control.processes() if told["pid"]}
    rows = []
    for row in _rows("", control, ports, versions, {name: psutil.Process(pid) for name, pid in on_host.items() if psutil.pid_exists(pid)}):
        machine = next((one for one in machines if one.name == row.name), None)
        if machine is None:
            rows.append(row)
            continue
        rows.append(Row(row.name, row.state, "", row.age, _tree(on_host.get(row.name)), machine.address))
        addresses = {
            "kube-apiserver": cluster.server(lab.subnet),
            "etcd": f"https://{machine.address}:2379",
            "kubelet": f"{machine.address}:10250",
        }
        try:
            children = psutil.Process(lifecycle.init_pid(state, machine.name)).children()
        except (psutil.Error, NotRunning):
            children = []
        named = {child.name()[:15]: child for child in children}
        within = {told["name"]: named.get(told["name"][:15]) for told in machine.supervisor.processes()}
        rows += _rows(f"{machine.name}/", machine.supervisor, addresses, versions, {name: child for name, child in within.items() if child})
    rows = _with_full_disks(state, rows)
    return [*_as_the_cluster_sees_them(lab, rows), *_addons(lab)] if lab.kubeconfig else rows


def _with_full_disks(state: Path, rows: list[Row]) -> list[Row]:
    """The rows, those that keep something on a disk without space with that as their state, whether they still run or not."""

    def told(row: Row) -> str:
        machine, _, program = row.name.rpartition("/")
        try:
            if program in DISKS:
                place = Path(f"/proc/{lifecycle.init_pid(state, machine)}/root") / DISKS[program]
            elif program.startswith("broker-"):
                place = state / program / "data"
            else:
                return ""
            disk = os.statvfs(place)
        except (OSError, NotRunning):
            return ""
        where = f"/{DISKS[program]} of {machine}" if machine else place
        free = disk.f_bavail * disk.f_frsize
        return f"its disk is full: {free >> 20} MB free at {where}" if free < SPARE else ""

    return [replace(row, state=full) if (full := told(row)) else row for row in rows]


def _as_the_cluster_sees_them(lab: settings.Lab, rows: list[Row]) -> list[Row]:
    """The rows, those of machines that run with what the API server says of them: not Ready, short of memory or disk, or nothing at all."""
    try:
        told = cluster.kubectl(lab.kubeconfig, "get", "--raw=/api/v1/nodes", f"--request-timeout={API_SECONDS}s", timeout=10)
        if told.returncode:
            seen = {cluster.CONTROL_PLANE: "runs, but its API server does not answer"}
        else:
            seen = {node["metadata"]["name"]: _ailing(node) for node in json.loads(told.stdout)["items"]}
    except (subprocess.TimeoutExpired, OSError):
        seen = {cluster.CONTROL_PLANE: "runs, but its API server does not answer"}
    return [replace(row, state=seen[row.name]) if row.state == "running" and seen.get(row.name) else row for row in rows]


def _ailing(node: dict) -> str:
    """The first condition of a node that is not as it should be."""
    for condition in node["status"].get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] != "True":
            return f"not Ready: {condition.get('message') or condition.get('reason', '')}".rstrip(".")
        if condition["type"].endswith("Pressure") and condition["status"] == "True":
            return f"{condition['type']}: {condition.get('message', '')}".rstrip(".")
    return ""


def pods(lab: settings.Lab) -> list[dict]:
    """Every Pod that has not ended, as the API tells it; none where the API server does not answer."""
    selected = "--field-selector=status.phase!=Succeeded,status.phase!=Failed"
    try:
        told = cluster.kubectl(lab.kubeconfig, "get", "pods", "-A", "-o", "json", selected, f"--request-timeout={API_SECONDS}s", timeout=10)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return [] if told.returncode else json.loads(told.stdout)["items"]


def addon_of(pod: dict) -> str:
    """The add-on that a Pod is of, by its image; empty if it is of none."""
    made = {image: addon.name for addon in addons.every().values() for image in addon.told.get("images", {addon.name: {}})}
    images = [container["image"].rpartition("/")[2].partition(":")[0] for container in pod["spec"]["containers"]]
    return next((made[image] for image in images if image in made), "")


def pod_memory(lab: settings.Lab) -> dict[str, int]:
    """Resident bytes of each Pod's processes, by the Pod's UID, found by the cgroup that each process is in."""
    found: dict[str, int] = {}
    for told in lifecycle.supervisor(Path(lab.state)).processes():
        try:
            below = psutil.Process(told["pid"]).children(recursive=True) if told["name"] in lab.nodes else []
        except psutil.Error:
            continue
        for process in below:
            try:
                group = re.search(r"/pod([0-9a-f-]{36})/", Path(f"/proc/{process.pid}/cgroup").read_text())
                if group:
                    found[group[1]] = found.get(group[1], 0) + process.memory_info().rss
            except (OSError, psutil.Error):
                continue
    return found


def _addons(lab: settings.Lab) -> list[Row]:
    """A row for each add-on that has Pods: one question to the API, a tenth of a second."""
    of: dict[str, list[dict]] = {}
    for pod in pods(lab):
        if name := addon_of(pod):
            of.setdefault(name, []).append(pod)
    memory = pod_memory(lab) if of else {}
    rows = []
    for name, own in sorted(of.items()):
        ready = [
            pod for pod in own if any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
        ]
        version = re.search(r"\d+\.\d+\.\d+", addons.every()[name].told["title"])
        started = [datetime.fromisoformat(pod["status"]["startTime"]).timestamp() for pod in own if "startTime" in pod["status"]]
        rows.append(
            Row(
                f"addon/{name}",
                "running" if len(ready) == len(own) else f"{len(ready)} of {len(own)} Pods ready",
                version[0] if version else "",
                time.time() - min(started) if started else 0.0,
                sum(memory.get(pod["metadata"]["uid"], 0) for pod in own),
                f"{len(own)} Pod{'s' * (len(own) > 1)}",
            )
        )
    return rows


def _tree(pid: int | None) -> int:
    """Resident bytes of a process and all below it."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if pid else []:
            total += process.memory_info().rss
    except psutil.Error:
        pass
    return total


def _etcd_version(cache: Path) -> str:
    program = next(iter(sorted(cache.glob("cluster-*/etcd"))), None)
    if program is None:
        return ""
    told = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()
    return told[2] if len(told) > 2 else ""


def logs() -> dict[str, Path]:
    """The log of each component by its name; where no lab is up, those of the last one that failed to come up."""
    lab = settings.find()
    if lab is None:
        return {path.stem: path for path in (settings.cache() / "failed").glob("*.log")}
    state = Path(lab.state)
    found = {path.stem: path for path in state.glob("host/log/*.log")}
    found |= {f"{path.relative_to(state).parts[0]}/{path.stem}": path for path in state.glob("*/var/supervisor/log/*.log")}
    return found


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("component", "state", "version", "age", "memory", "address"):
        table.add_column(heading, justify="right" if heading in ("age", "memory") else "left", no_wrap=heading != "state")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            row.version,
            _age(row.age) if row.age else "",
            f"{row.memory / 1e6:.0f} MB" if row.memory else "",
            row.address,
        )
    console.print(table)
