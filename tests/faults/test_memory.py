"""A Pod eats the memory of its node."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from ..conftest import CGROUPS, STATE
from ..conftest import until as wait_until
from .conftest import PATIENCE, SHOP, Broken

until = functools.partial(wait_until, limit=PATIENCE)
pytestmark = pytest.mark.slow
SPARE = 192 << 20
GREEDY = """
import time
eaten = []
while len(eaten) < 256:
    eaten.append(bytearray(b"x" * (4 << 20)))
print("nobody stopped it")
time.sleep(3600)
"""


def memory(node: str) -> tuple[Path, Path, str]:
    """Where a node's memory is limited and told, and what stands for no limit."""
    if (CGROUPS / "cgroup.controllers").exists():
        folder = CGROUPS / STATE.name / node
        return folder / "memory.max", folder / "memory.current", "max"
    folder = CGROUPS / "memory" / STATE.name / node
    return folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes", "-1"


def test_a_pod_eats_the_memory_of_its_node(broken: Broken) -> None:
    broken.stays()
    pods = broken.in_pods("app=stays")
    daemons = {name: broken.component(f"node-1/{name}") for name in ("containerd", "kubelet", "kube-proxy")}
    limit, used, none = memory("node-1")
    limit.write_text(str(int(used.read_text()) + SPARE))
    try:
        greedy = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "greedy"},
            "spec": {
                "nodeName": "node-1",
                "restartPolicy": "Never",
                "containers": [{"name": "main", "image": SHOP, "command": ["python3", "-u", "-c", GREEDY]}],
            },
        }
        assert broken.apply(greedy)
        until(lambda: broken.get("pod", "greedy")["status"]["phase"] in ("Failed", "Succeeded"))
        start = time.monotonic()
        ended = broken.get("pod", "greedy")["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)
        assert broken.kubectl("logs", "greedy").stdout == ""
    finally:
        limit.write_text(none)
    assert broken.kubectl("delete", "pod", "greedy").returncode == 0
    broken.runs_pods()
    broken.well()
    seconds = time.monotonic() - start
    assert {name: broken.component(f"node-1/{name}") for name in daemons} == daemons, "a component of the node was killed in its place"
    assert broken.in_pods("app=stays") == pods
    assert broken.restarts("stays") == 0
    broken.tell("a Pod eats its node's memory", "the Pod: OOMKilled, 137", seconds, "every other Pod and every component, with its process")
