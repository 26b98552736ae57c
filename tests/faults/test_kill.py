"""One process, or one machine, is gone at once: what runs on, who sees what, and how long until all is well."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from ..conftest import STATE, until
from .conftest import PATIENCE, Broken, Writer, in_sync, kill

until = functools.partial(until, limit=PATIENCE)
slow = pytest.mark.slow


def comes_back(broken: Broken, name: str) -> tuple[str, float]:
    """SIGKILL a component; what the user sees, and the seconds until it runs and Pods are started everywhere again."""
    victim = broken.component(name)
    age = broken.lab.rows()[name]["age"]
    start = time.monotonic()
    kill(victim)
    until(lambda: anew(broken, name, victim))
    broken.runs_pods()
    seconds = time.monotonic() - start
    broken.well()
    row = broken.lab.rows()[name]
    assert row["state"] == "running"
    assert row["age"] < age + time.monotonic() - start
    assert row["age"] < time.monotonic() - start + 5, "`lab status` shows it as old as before"
    return "`lab status`: running, its age begins anew", seconds


def anew(broken: Broken, name: str, victim: psutil.Process) -> bool:
    try:
        return broken.component(name) != victim
    except (StopIteration, psutil.Error):
        return False


@pytest.mark.parametrize(
    "name",
    [
        "control-plane/etcd",
        pytest.param("control-plane/kube-apiserver", marks=slow),
        pytest.param("control-plane/kube-controller-manager", marks=slow),
        pytest.param("control-plane/kube-scheduler", marks=slow),
        pytest.param("node-1/kubelet", marks=slow),
        "node-1/containerd",
    ],
)
def test_a_component_is_killed(broken: Broken, name: str) -> None:
    broken.stays()
    pods = broken.in_pods("app=stays")
    assert len(pods) >= 2
    seen, seconds = comes_back(broken, name)
    assert broken.in_pods("app=stays") == pods, "a Pod's processes are others than before"
    assert broken.restarts("stays") == 0
    assert broken.kept()
    broken.tell(f"kill -9 {name}", seen, seconds, "every object; every Pod, with its processes")


@slow
def test_a_node_loses_its_power_for_a_moment(broken: Broken) -> None:
    broken.stays()
    before = broken.in_pods("app=stays")
    age = broken.lab.rows()["node-1"]["age"]
    start = time.monotonic()
    init = broken.init("node-1")
    kill(init)
    until(lambda: not init.is_running())
    until(lambda: broken.restarts("stays") == 1)
    until(lambda: broken.ready("daemonset", "stays"))
    broken.runs_pods()
    seconds = time.monotonic() - start
    broken.well()
    assert broken.lab.rows()["node-1"]["age"] < age + seconds
    assert before & broken.in_pods("app=stays"), "Pods on the other node ought to run on"
    assert broken.restarts("stays") == 1
    assert broken.kept()
    broken.tell("kill -9 of node-1's PID 1", "RESTARTS 1 of its Pods", seconds, "every object; Pods on the other node")


@slow
def test_a_node_stays_dead_until_up(broken: Broken) -> None:
    from lab import lifecycle

    broken.stays()
    lifecycle.supervisor(STATE).kill_program("node-2")
    rows = broken.lab.rows()
    assert rows["node-2"]["state"] == "stopped"
    assert {row["state"] for name, row in rows.items() if name != "node-2"} == {"running"}
    assert broken.lab("status").returncode == 1
    until(lambda: ready(broken, "node-2") == "Unknown")
    start = time.monotonic()
    assert "node-2 was stopped; starting it" in broken.lab.well("up")
    assert ready(broken, "node-2") == "True", "`lab up` ended before the node was Ready"
    until(lambda: broken.ready("daemonset", "stays"))
    broken.runs_pods()
    seconds = time.monotonic() - start
    broken.well()
    assert broken.kept()
    broken.tell("node-2 without power", "`lab status`: node-2 stopped; NotReady", seconds, "every object; Pods on the other node")


def ready(broken: Broken, node: str) -> str:
    conditions = broken.get("node", node).get("status", {}).get("conditions", [])
    return next((one["status"] for one in conditions if one["type"] == "Ready"), "")


def test_a_broker_is_killed(broken: Broken) -> None:
    with Writer("one-killed") as writer:
        victim = broken.component("broker-1")
        start = time.monotonic()
        kill(victim)
        writer.goes_on()
        until(lambda: anew(broken, "broker-1", victim))
        until(lambda: in_sync("one-killed") == 3)
        seconds = time.monotonic() - start
        writer.goes_on()
    broken.well()
    assert writer.refused == {}
    assert writer.lost() == set()
    broken.tell("kill -9 broker-1", "nothing: its producer goes on", seconds, f"all {len(writer.acknowledged)} acknowledged messages")


@slow
def test_two_brokers_are_dead(broken: Broken) -> None:
    from lab import lifecycle

    control = lifecycle.supervisor(STATE)
    with Writer("two-killed") as writer:
        control.kill_program("broker-2")
        control.kill_program("broker-3")
        until(lambda: writer.refused)
        told = len(writer.acknowledged)
        until(lambda: len(writer.refused) > 100)
        assert len(writer.acknowledged) == told, "a message was acknowledged that one broker alone has"
        rows = broken.lab.rows()
        assert (rows["broker-1"]["state"], rows["broker-2"]["state"], rows["broker-3"]["state"]) == ("running", "stopped", "stopped")
        assert broken.lab("status").returncode == 1
        start = time.monotonic()
        said = broken.lab.well("up")
        assert "broker-2 was stopped; starting it." in said
        assert "broker-3 was stopped; starting it." in said
        writer.goes_on()
        seconds = time.monotonic() - start
    broken.well()
    reasons = sorted(set(writer.refused.values()))
    assert writer.lost() == set()
    broken.tell(
        "kill -9 broker-2 and broker-3",
        f"`lab status`: both stopped; acks=all: {', '.join(reasons)}",
        seconds,
        f"all {len(writer.acknowledged)} acknowledged messages",
    )


def resolves(broken: Broken) -> bool:
    program = "import socket; print(socket.gethostbyname('kubernetes.default.svc.cluster.local'))"
    done = broken.kubectl("exec", "daemonset/stays", "--", "python3", "-c", program)
    return done.stdout.strip() == "10.96.0.1"


def dies_in_its_pod(find: Callable[[], set[psutil.Process]], name: str) -> int:
    """SIGKILL the processes of that name in a Pod; how many there were."""
    victims = [process for process in find() if process.name() == name]
    for victim in victims:
        kill(victim)
    return len(victims)


@slow
def test_coredns_is_killed(broken: Broken) -> None:
    broken.stays()
    assert resolves(broken)
    start = time.monotonic()
    assert dies_in_its_pod(lambda: broken.in_pods("k8s-app=kube-dns", "kube-system"), "coredns") > 0
    until(lambda: restarted(broken, "kube-system", "k8s-app=kube-dns"))
    until(lambda: resolves(broken))
    seconds = time.monotonic() - start
    broken.runs_pods()
    broken.well()
    broken.tell("kill -9 of every CoreDNS", "RESTARTS 1; names do not resolve meanwhile", seconds, "every object; every other Pod")


@slow
def test_envoy_is_killed(broken: Broken) -> None:
    broken.lab.well("addon", "loadbalancer", "gateway")
    broken.stays()
    assert broken.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "stays"},
            "spec": {"selector": {"app": "stays"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "stays"},
            "spec": {
                "parentRefs": [{"name": "contour", "namespace": "projectcontour"}],
                "hostnames": ["stays.shop.test"],
                "rules": [{"backendRefs": [{"name": "stays", "port": 80}]}],
            },
        },
    )
    front = until(
        lambda: broken.kubectl(
            "-n=projectcontour", "get", "service", "envoy", "-o=jsonpath={.status.loadBalancer.ingress[0].ip}"
        ).stdout.strip()
    )
    until(lambda: answers(front))
    start = time.monotonic()
    assert dies_in_its_pod(lambda: broken.in_pods("app=envoy", "projectcontour"), "envoy") > 0
    until(lambda: restarted(broken, "projectcontour", "app=envoy"))
    until(lambda: broken.ready("daemonset", "envoy", "projectcontour"))
    until(lambda: answers(front))
    seconds = time.monotonic() - start
    broken.well()
    assert broken.kept()
    broken.tell("kill -9 of every Envoy", "`lab status`: addon/gateway, Pods not ready; RESTARTS 1", seconds, "every route")


def answers(front: str) -> bool:
    done = subprocess.run(["curl", "-sf", "-m5", "-HHost: stays.shop.test", f"http://{front}/"], capture_output=True, text=True)
    return done.returncode == 0 and json.loads(done.stdout)["version"] == "v1"


def restarted(broken: Broken, namespace: str, selector: str) -> bool:
    """Whether a container of each of these Pods was started again."""
    pods = broken.get("-n", namespace, "pods", "-l", selector).get("items", [])
    return bool(pods) and all(sum(one["restartCount"] for one in pod["status"].get("containerStatuses", [])) for pod in pods)
