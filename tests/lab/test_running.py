"""What a lab that is up offers, shows and hides."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from ..conftest import STATE, Lab
from ..conftest import until as wait_until

COMPONENTS = {
    "control-plane": ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    "node-1": ("containerd", "kubelet", "kube-proxy"),
    "node-2": ("containerd", "kubelet", "kube-proxy"),
}
PATIENCE = 60
until = functools.partial(wait_until, limit=PATIENCE)


def told() -> dict:
    return json.loads((STATE / "lab.json").read_text())


def in_a_pod(lab: Lab, name: str, program: str) -> str:
    """Run a Python program in a Pod and return what it prints."""
    lab("kubectl", "delete", "pod", name, "--ignore-not-found", "--now")
    image = "localhost/by-experiment/client:v1"
    lab.kubectl("run", name, f"--image={image}", "--restart=Never", "--command", "--", "python3", "-c", program)
    until(lambda: lab.kubectl("get", "pod", name, "-o=jsonpath={.status.phase}") in ("Succeeded", "Failed"))
    said = lab.kubectl("logs", name)
    lab.kubectl("delete", "pod", name, "--now")
    return said


def test_status_names_every_component_and_all_run(up: Lab) -> None:
    rows = up.rows()
    expected = {
        *COMPONENTS,
        *(f"{machine}/{name}" for machine, names in COMPONENTS.items() for name in names),
        "broker-1",
        "broker-2",
        "broker-3",
    }
    assert set(rows) == expected
    assert {row["state"] for row in rows.values()} == {"running"}
    assert rows["node-1/kubelet"]["version"] == "1.37.2"
    assert all(row["memory"] > 0 for row in rows.values())


def test_up_again_finds_it_running(up: Lab) -> None:
    before = {name: row["age"] for name, row in up.rows().items()}
    assert "up already" in up.well("up")
    after = {name: row["age"] for name, row in up.rows().items()}
    assert all(after[name] >= before[name] for name in before)


def test_another_number_of_nodes_is_refused(up: Lab) -> None:
    assert "runs with 2 node(s), not 3" in up.fails("up", "--nodes=3")


def test_names_resolve_and_brokers_answer_inside_a_pod(up: Lab) -> None:
    host, port = told()["bootstrap_pods"].split(",")[0].split(":")
    program = (
        "import socket; print(socket.gethostbyname('kubernetes.default.svc.cluster.local')); "
        f"socket.create_connection(('{host}', {port}), 5); print('connected')"
    )
    assert in_a_pod(up, "resolve", program).split() == ["10.96.0.1", "connected"]


def test_a_component_that_dies_is_restarted(up: Lab) -> None:
    from lab import lifecycle

    for machine, name in (("node-1", "kubelet"), ("control-plane", "etcd")):
        init = psutil.Process(lifecycle.init_pid(STATE, machine))
        victim = next(child for child in init.children() if child.name() == name)
        victim.send_signal(signal.SIGKILL)
        until(
            lambda name=name, init=init, victim=victim: any(child.name() == name and child.pid != victim.pid for child in init.children())
        )
    until(lambda: up("kubectl", "get", "--raw=/readyz").returncode == 0)
    assert up.kubectl("get", "nodes", "-o=name").split() == ["node/node-1", "node/node-2"]


def test_a_broker_can_be_killed_and_brought_back(up: Lab) -> None:
    from lab.supervise import Supervisor

    control = Supervisor(STATE / "host")
    control.kill_program("broker-2")
    assert up.rows()["broker-2"]["state"] != "running"
    assert up("status").returncode == 1
    assert "starting it" in up.well("up")
    assert up.rows()["broker-2"]["state"] == "running"


def test_a_node_restart_keeps_its_pods(up: Lab) -> None:
    up.kubectl("create", "deployment", "stays", "--image=localhost/by-experiment/shop:v1", "--replicas=2")
    up.kubectl("rollout", "status", "deployment/stays", f"--timeout={PATIENCE}s")
    up.well("node", "restart", "node-2")
    restarted = "-o=jsonpath={.items[*].status.containerStatuses[0].restartCount}"
    until(lambda: "1" in up.kubectl("get", "pods", "-l=app=stays", restarted))
    up.kubectl("wait", "pod", "-l=app=stays", "--for=condition=Ready", f"--timeout={PATIENCE}s")
    up.kubectl("delete", "deployment", "stays")


def test_logs_by_name(up: Lab) -> None:
    assert "node-1/kubelet" in up.well("logs")
    said = up.well("logs", "kubelet", "-n", "3")
    assert [line for line in said.splitlines() if line.startswith("==>")] == ["==> node-1/kubelet", "==> node-2/kubelet"]
    assert len(said.splitlines()) == 8
    assert "no log of 'nonsense'" in up.fails("logs", "nonsense")


def test_a_second_checkout_is_told_who_holds_the_lab(up: Lab, tmp_path: Path) -> None:
    other = tmp_path / "weitere Prüfung"
    checkout = Path(__file__).parents[2]
    (other / "env").mkdir(parents=True)
    subprocess.run(
        ["cp", "-r", *(str(checkout / "env" / name) for name in ("lab", "cluster", "images", "kafka", "go.txt")), str(other / "env")],
        check=True,
    )
    elsewhere = {"PYTHONPATH": str(other / "env")}
    for command in ("up", "down"):
        assert str(checkout) in up.fails(command, **elsewhere)
    own = {"LAB_CLUSTER": "context:lab", "LAB_BROKERS": told()["bootstrap"], "KUBECONFIG": told()["kubeconfig"], "LAB_INSTANCE": "8"}
    assert "Nothing to start" in up.well("up", **elsewhere, **own)
    lesson = (
        "import lab; t = lab.start('elsewhere', cluster=True, brokers=True); "
        "from kubernetes import client; assert client.CoreV1Api().read_namespace(t.namespace); t.clean_up()"
    )
    done = subprocess.run(
        [sys.executable, "-c", lesson], env={**os.environ, **elsewhere, **own}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-2:] == [
        "Runs on Kubernetes v1.37.2 with 2 nodes and Kafka with 3 brokers.",
        "Cleaned up: the namespace and the topics.",
    ], done.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"LAB_CLUSTER": "nonsense"}, "LAB_CLUSTER='nonsense' is not understood"),
        ({"LAB_CLUSTER": "context:nonsense"}, "has no context 'nonsense'"),
        ({"LAB_CLUSTER": "context:lab", "KUBECONFIG": "/dev/null"}, "No kubeconfig can be read at /dev/null"),
        ({"LAB_CLUSTER": "context:lab", "LAB_IMAGES": "localhost/nowhere"}, "does not have the image localhost/nowhere/client:v1"),
        ({"LAB_BROKERS": "nonsense"}, "'nonsense' is not a bootstrap server"),
        ({"LAB_BROKERS": "127.0.0.1:1"}, "No broker answers at 127.0.0.1:1"),
        ({"LAB_BROKERS": "nowhere.invalid:9092"}, "No broker answers at nowhere.invalid:9092"),
    ],
)
def test_what_is_brought_along_is_checked(up: Lab, environment: dict[str, str], says: str) -> None:
    assert says in up.fails("up", **({"KUBECONFIG": told()["kubeconfig"]} | environment))


def test_brokers_that_take_the_call_and_say_nothing(up: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert f"No broker answers at {address}" in up.fails("up", "--no-cluster", LAB_BROKERS=address)


def test_a_context_without_the_rights_is_told_which(up: Lab, tmp_path: Path) -> None:
    kubeconfig = yaml.safe_load(Path(told()["kubeconfig"]).read_text())
    kubeconfig["users"][0]["user"] = {"token": up.kubectl("create", "token", "default", "--duration=10m").strip()}
    visitor = tmp_path / "visitor's kubeconfig"
    visitor.write_text(yaml.safe_dump(kubeconfig))
    said = up.fails("up", LAB_CLUSTER="context:lab", KUBECONFIG=str(visitor))
    assert "In the cluster of context 'lab' you may not create namespaces. Ask its administrator for that right." in said


def test_a_token_that_nobody_gave_is_refused(up: Lab, tmp_path: Path) -> None:
    kubeconfig = yaml.safe_load(Path(told()["kubeconfig"]).read_text())
    kubeconfig["users"][0]["user"] = {"token": "nobody-gave-this"}
    stranger = tmp_path / "kubeconfig"
    stranger.write_text(yaml.safe_dump(kubeconfig))
    assert "The cluster of context 'lab' refused: 401" in up.fails("up", LAB_CLUSTER="context:lab", KUBECONFIG=str(stranger))


def test_a_cluster_older_than_the_lessons_need(up: Lab) -> None:
    program = "from lab import byo, cli; byo.OLDEST = (1, 99); cli.main(['up'], prog_name='lab')"
    own = up.environment | {"LAB_CLUSTER": "context:lab", "KUBECONFIG": told()["kubeconfig"]}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "lab: The cluster of context 'lab' is Kubernetes v1.37.2. The lessons need 1.99 or later.\n"
