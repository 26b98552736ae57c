"""The lab's own figures: starting, stopping, idling. Medians of several runs, printed as a table, never asserted."""

from __future__ import annotations

import json
import statistics
import time

import psutil
from kubernetes import client, config
from rich.console import Console
from rich.table import Table

from lab import addons, images, lifecycle, provision, settings
from lab.errors import Occupied
from lab.report import Report

RESOLVE = (
    "import json, socket, time\n"
    "while True:\n"
    "    try:\n"
    "        socket.getaddrinfo('kubernetes.default.svc.cluster.local', 443)\n"
    "        print(json.dumps({'resolved': time.time()}), flush=True)\n"
    "        break\n"
    "    except OSError:\n"
    "        time.sleep(0.05)\n"
)
PUBLISHED = {
    "lab up: nodes Ready, DNS answers inside a Pod": "k3d 19.9 s, kind 33.0 s, minikube 50.8 s",
    "processor time of that": "k3d 6.8 s, kind 11.0 s",
    "memory, cluster and three brokers idle": "k3s server alone 1.6 GB",
    "three brokers in one quorum": "KIP-974: one JVM broker 1.2 s",
}
"""What others publish of themselves, for comparison; measured on other machines."""


def run(runs: int, console: Console) -> None:
    """Measure and print.

    Args:
        runs: How often each start is measured.
        console: Where the table goes.

    Raises:
        Occupied: A lab is up already.
    """
    if settings.find() is not None:
        raise Occupied(
            "A lab is up, and measuring starts and stops one.",
            "Take it down first with `lab down`, or measure beside it with LAB_INSTANCE=9.",
        )
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    report, silent = Report(), Report(quiet=True)
    lifecycle.prepare(report, with_cluster=True, with_brokers=True, with_addons=True)
    with report.step(f"Start and stop the lab {runs} times") as step:
        for done in range(runs):
            began = time.time()
            own = time.process_time()
            lab = lifecycle.up(silent, with_brokers=False)
            ready = time.time()
            note("lab up: nodes Ready, CoreDNS Ready", ready - began)
            note("lab up: nodes Ready, DNS answers inside a Pod", _resolved_in_a_pod(lab.kubeconfig) - began)
            note("processor time of that", _processor_seconds() + time.process_time() - own)
            began = time.time()
            lifecycle.down(silent)
            note("lab down", time.time() - began)
            began = time.time()
            lifecycle.up(silent, with_cluster=False)
            note("three brokers in one quorum", time.time() - began)
            lifecycle.down(silent)
            step.progress(done + 1, runs, "runs")
    lifecycle.up(silent)
    with report.step("Let everything idle for 30 s"):
        time.sleep(30)
    note("memory, cluster and three brokers idle", _unshared_bytes() / 1e9)
    for name in (name for name, one in addons.every().items() if one.in_cluster):
        before, began = _unshared_bytes(), time.time()
        provision.up(silent, [name])
        note(f"lab addon {name}", time.time() - began)
        time.sleep(5)
        note(f"memory that {name} adds", (_unshared_bytes() - before) / 1e9)
    lifecycle.down(silent)

    table = Table(
        box=None,
        pad_edge=False,
        title=f"Kubernetes {settings.KUBERNETES}, Kafka {settings.KAFKA}, {psutil.cpu_count()} cores",
        title_justify="left",
    )
    for heading in ("what", "median", "min", "max", "runs", "others, as published"):
        table.add_column(heading, justify="right" if heading in ("median", "min", "max", "runs") else "left")
    for name, values in figures.items():
        unit = "GB" if name.startswith("memory") else "s"
        shown = [f"{value:.2f} {unit}" for value in (statistics.median(values), min(values), max(values))]
        table.add_row(name, *shown, str(len(values)), PUBLISHED.get(name, ""))
    console.print(table)


def _processes() -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for process in lifecycle.processes(settings.state()):
        for one in (process, *process.children(recursive=True)):
            found[one.pid] = one
    return list(found.values())


def _processor_seconds() -> float:
    total = 0.0
    for process in _processes():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _unshared_bytes() -> float:
    """Proportional set sizes added up, so that a page that several processes share counts once."""
    total = 0.0
    for process in _processes():
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, OSError):
            continue
    return total


def _resolved_in_a_pod(kubeconfig: str) -> float:
    config.load_kube_config(kubeconfig)
    api = client.CoreV1Api()
    while not api.list_namespaced_service_account("default", field_selector="metadata.name=default").items:
        time.sleep(0.02)
    container = {"name": "resolve", "image": images.name("client:v1"), "command": ["python3", "-c", RESOLVE]}
    api.create_namespaced_pod("default", {"metadata": {"name": "resolve"}, "spec": {"restartPolicy": "Never", "containers": [container]}})
    while api.read_namespaced_pod_status("resolve", "default").status.phase != "Succeeded":
        time.sleep(0.05)
    return json.loads(api.read_namespaced_pod_log("resolve", "default", _preload_content=False).data)["resolved"]
