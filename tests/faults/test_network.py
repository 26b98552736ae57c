"""The cable of a node is pulled, and put back."""

from __future__ import annotations

import functools
import subprocess
import time

import pytest

from ..conftest import LINK
from ..conftest import until as wait_until
from .conftest import PATIENCE, Broken, template, workload

until = functools.partial(wait_until, limit=PATIENCE)
pytestmark = pytest.mark.slow


def cable(node: str, state: str) -> None:
    subprocess.run(["ip", "-n", f"{LINK}-switch", "link", "set", f"to-{node}", state], check=True)


def pods(broken: Broken, app: str) -> dict[str, dict]:
    """The Pods of an app that are not ending, by the node they are on."""
    found = broken.get("pods", "-l", f"app={app}").get("items", [])
    return {pod["spec"].get("nodeName", ""): pod for pod in found if "deletionTimestamp" not in pod["metadata"]}


def test_a_node_is_cut_off_and_comes_back(broken: Broken) -> None:
    broken.stays()
    moves = template("moves")
    moves["spec"]["tolerations"] = [
        {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
        for what in ("unreachable", "not-ready")
    ]
    moves["spec"]["affinity"] = {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "preference": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node-2"]}]},
                }
            ]
        }
    }
    assert broken.apply(workload("Deployment", "moves", moves, replicas=1))
    until(lambda: broken.ready("deployment", "moves"))
    assert set(pods(broken, "moves")) == {"node-2"}
    running = broken.in_pods("app=stays")

    cable("node-2", "down")
    try:
        until(lambda: broken.lab.rows()["node-2"]["state"].startswith("not Ready"), every=2)
        rows = broken.lab.rows()
        assert rows["node-2"]["state"] == "not Ready: Kubelet stopped posting node status"
        assert broken.lab("status").returncode == 1
        until(lambda: "node-1" in pods(broken, "moves"))
        until(lambda: broken.ready("deployment", "moves"))
        assert broken.in_pods("app=stays") == running, "a Pod that cannot be reached ought to run on"
    finally:
        cable("node-2", "up")
    start = time.monotonic()
    until(lambda: broken.lab.rows()["node-2"]["state"] == "running")
    seconds = time.monotonic() - start
    until(lambda: broken.ready("daemonset", "stays"))
    broken.runs_pods()
    broken.well()
    assert broken.restarts("stays") == 0
    assert broken.in_pods("app=stays") == running
    assert set(pods(broken, "moves")) == {"node-1"}
    broken.tell(
        "node-2's cable pulled", f"`lab status`: node-2 {rows['node-2']['state']}", seconds, "every Pod, with its processes; one moved"
    )


def test_the_network_between_the_nodes_is_gone_for_a_moment(broken: Broken) -> None:
    broken.stays()
    other = pods(broken, "stays")["node-2"]["status"]["podIP"]
    mine = pods(broken, "stays")["node-1"]["metadata"]["name"]

    def reaches(timeout: int = 2) -> bool:
        program = f"import urllib.request; print(urllib.request.urlopen('http://{other}:8080/', timeout={timeout}).status)"
        return broken.kubectl("exec", mine, "--", "python3", "-c", program).stdout.strip() == "200"

    until(reaches)
    cable("node-2", "down")
    try:
        assert not reaches()
    finally:
        cable("node-2", "up")
    start = time.monotonic()
    until(reaches)
    seconds = time.monotonic() - start
    broken.well()
    assert broken.restarts("stays") == 0
    broken.tell("node-2's cable pulled for seconds", "requests between Pods time out", seconds, "every object; every Pod")
