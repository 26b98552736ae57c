"""A lab to break, what goes on in it meanwhile, and a table of how it got well again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from ..conftest import PORT, STATE, Lab, changed, machine, traces, until

PATIENCE = 180
"""Seconds that anything here may take to get well; the longest took under 30 on two idle cores."""
SHOP = "localhost/by-experiment/shop:v1"
BOOTSTRAP = ",".join(f"127.0.0.1:{PORT + number}" for number in range(3))
TABLE = pytest.StashKey[list[tuple[str, str, str, str]]]()


@dataclass(frozen=True)
class Broken:
    """A lab that is up, to be broken.

    Args:
        lab: The command.
        tell: Writes a row of the table: fault, what the user sees, seconds until well again, what survived.
    """

    lab: Lab
    tell: Callable[[str, str, float, str], None]

    def kubectl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl, which may fail."""
        from lab import cluster

        with contextlib.suppress(subprocess.TimeoutExpired):
            return cluster.kubectl(STATE / "kubeconfig", "--request-timeout=10s", *arguments, stdin=stdin)
        return subprocess.CompletedProcess(arguments, 1, "", "timed out")

    def apply(self, *objects: dict) -> bool:
        """Apply objects; whether the cluster took them."""
        return self.kubectl("apply", "--validate=false", "-f", "-", stdin=yaml.safe_dump_all(objects)).returncode == 0

    def get(self, *arguments: str) -> dict:
        """An object, or {} where the API server does not give it."""
        done = self.kubectl("get", *arguments, "-o", "json")
        return {} if done.returncode or not done.stdout.strip() else json.loads(done.stdout)

    def ready(self, kind: str, name: str, namespace: str = "default") -> bool:
        """Whether every Pod of a Deployment or DaemonSet is ready, and as it was last asked for."""
        told = self.get("-n", namespace, kind, name)
        status = told.get("status", {})
        if not told or status.get("observedGeneration") != told["metadata"]["generation"]:
            return False
        wanted = told["spec"]["replicas"] if kind == "deployment" else status.get("desiredNumberScheduled", 0)
        return wanted == status.get("readyReplicas" if kind == "deployment" else "numberReady", 0)

    def runs_pods(self, limit: float = PATIENCE) -> None:
        """Wait until a Deployment, new, has a Pod ready on each node: every component had its part in it. Then delete it."""
        name = f"probe-{time.monotonic_ns()}"
        pod = template(name)
        pod["spec"]["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": name}},
                "nodeTaintsPolicy": "Honor",
            }
        ]
        until(lambda: self.apply(workload("Deployment", name, pod, replicas=2)), limit)
        until(lambda: self.ready("deployment", name), limit)
        until(lambda: self.kubectl("delete", "deployment", name).returncode == 0, limit)

    def well(self, limit: float = PATIENCE) -> None:
        """Wait until `lab status` calls everything well."""
        until(lambda: self.lab("status").returncode == 0, limit)

    def init(self, name: str) -> psutil.Process:
        """PID 1 of a machine, as the host sees it."""
        from lab import lifecycle

        return psutil.Process(lifecycle.init_pid(STATE, name))

    def component(self, name: str) -> psutil.Process:
        """A process by its name in `lab status`."""
        from lab import lifecycle

        where, _, program = name.rpartition("/")
        if not where:
            return psutil.Process(next(told["pid"] for told in lifecycle.supervisor(STATE).processes() if told["name"] == program))
        return next(child for child in self.init(where).children() if os.path.basename((child.cmdline() or [""])[0]) == program)

    def in_pods(self, selector: str, namespace: str = "default") -> set[psutil.Process]:
        """The processes of the containers of these Pods, whatever node they are on."""
        uids = {pod["metadata"]["uid"] for pod in self.get("-n", namespace, "pods", "-l", selector)["items"]}
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                group = re.search(r"/pod([0-9a-f-]{36})/", Path(f"/proc/{process.pid}/cgroup").read_text())
                if group and group[1] in uids and process.name() != "catatonit":
                    found.add(process)
        return found

    def restarts(self, app: str) -> int:
        """How often containers of the Pods with the label app were started again."""
        pods = self.get("pods", "-l", f"app={app}")["items"]
        return sum(one["restartCount"] for pod in pods for one in pod["status"].get("containerStatuses", []))

    def stays(self) -> None:
        """Bring up what is to survive: a Pod per node, an object."""
        assert self.apply(
            workload("DaemonSet", "stays", template("stays")),
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"a": "1"}},
        )
        until(lambda: self.ready("daemonset", "stays"), PATIENCE)

    def kept(self) -> bool:
        """Whether the object is there."""
        return self.get("configmap", "kept").get("data") == {"a": "1"}


def template(app: str, **container: object) -> dict:
    """A Pod of the demo shop, for a workload."""
    return {
        "metadata": {"labels": {"app": app}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "main", "image": SHOP} | container]},
    }


def workload(kind: str, name: str, pod: dict, **spec: object) -> dict:
    """A Deployment, or the like, of Pods labelled with its name."""
    selector = {"matchLabels": {"app": name}}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": {"selector": selector, "template": pod} | spec}


@dataclass
class Writer:
    """Writes numbered messages with acks=all, a hundred a second, from the beginning of the block to its end.

    Args:
        topic: Where to; three partitions, three copies, two of which must be in sync.
    """

    topic: str
    acknowledged: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    _sent: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Writer:
        """Make the topic and begin."""
        admin = AdminClient({"bootstrap.servers": BOOTSTRAP})
        admin.create_topics([NewTopic(self.topic, 3, 3, config={"min.insync.replicas": "2"})])[self.topic].result(60)
        self._producer = Producer(
            {"bootstrap.servers": BOOTSTRAP, "enable.idempotence": True, "delivery.timeout.ms": 15_000, "linger.ms": 5}
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.goes_on()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            number = self._sent
            with contextlib.suppress(BufferError):
                self._producer.produce(self.topic, str(number), on_delivery=lambda error, message, n=number: self._told(n, error, message))
                self._sent += 1
            self._producer.poll(0)

    def _told(self, number: int, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.acknowledged.add(number)
        else:
            self.refused[number] = error.name()

    def goes_on(self, count: int = 100) -> None:
        """Wait until more messages are acknowledged than now."""
        before = len(self.acknowledged)
        until(lambda: len(self.acknowledged) >= before + count, PATIENCE)

    def __exit__(self, *_: object) -> None:
        """Stop, and wait for the last answer."""
        self._stop.set()
        self._thread.join()
        self._producer.flush(60)

    def lost(self) -> set[int]:
        """The acknowledged messages that cannot be read."""
        consumer = Consumer({"bootstrap.servers": BOOTSTRAP, "group.id": self.topic, "isolation.level": "read_uncommitted"})
        ends = {number: consumer.get_watermark_offsets(TopicPartition(self.topic, number), 60)[1] for number in range(3)}
        consumer.assign([TopicPartition(self.topic, number, 0) for number in ends])
        read, left, end = set(), {number for number, last in ends.items() if last}, time.monotonic() + PATIENCE
        while left:
            assert time.monotonic() < end, f"only {len(read)} messages could be read"
            for message in consumer.consume(500, 1.0):
                if message.error() is None:
                    read.add(int(message.value()))
                    if message.offset() >= ends[message.partition()] - 1:
                        left.discard(message.partition())
        consumer.close()
        return self.acknowledged - read


def in_sync(topic: str) -> int:
    """In how many copies, at least, every partition of a topic is there."""
    told = AdminClient({"bootstrap.servers": BOOTSTRAP}).list_topics(topic, 30).topics[topic]
    return min(len(partition.isrs) for partition in told.partitions.values())


@pytest.fixture
def broken(lab: Lab, record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Iterator[Broken]:
    """A fresh lab to break; at the end it is taken down, and the machine must be what it was."""
    lab.well("down", "--force")
    before = machine()
    lab.well("up")

    def tell(fault: str, seen: str, seconds: float, survived: str) -> None:
        record_property("fault", {"fault": fault, "seen": seen, "seconds": round(seconds, 1), "survived": survived})
        request.config.stash.setdefault(TABLE, []).append((fault, seen, f"{seconds:.1f}", survived))

    yield Broken(lab, tell)
    lab.well("down")
    assert traces() == []
    assert changed(before, patience=20) == []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    if not (rows := config.stash.get(TABLE, [])):
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("fault", "what the user sees", "seconds until well", "what survived"):
        table.add_column(heading, justify="right" if heading.startswith("seconds") else "left")
    for row in rows:
        table.add_row(*row)
    terminalreporter.section("faults")
    Console(width=150, highlight=False).print(table)


def kill(process: psutil.Process) -> None:
    """SIGKILL, at once."""
    process.send_signal(signal.SIGKILL)
