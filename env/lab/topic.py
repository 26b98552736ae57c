"""What a notebook starts with: a fresh namespace and topic prefix on whatever cluster and brokers there are."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kubernetes import client, config

from lab import access, images, lifecycle, settings
from lab.errors import LabError, NotRunning
from lab.load import Load
from lab.shell import use_pipes
from lab.watch import Watch

TOPIC, OWNER = "by-experiment/topic", "by-experiment/owner"


def _owner() -> str:
    return hashlib.sha256(f"{getpass.getuser()}@{socket.gethostname()}:{settings.CHECKOUT}".encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Brokers:
    """The embedded brokers, to be killed and brought back. Brokers of your own are not touched."""

    embedded: bool

    def _supervisor(self):
        lab = settings.find()
        if not self.embedded or lab is None or not lab.bootstrap:
            raise NotRunning(
                "This experiment ends a broker, which only the lab's own brokers are there for.",
                "Run it without LAB_BROKERS, on brokers started by `lab up`.",
            )
        return lifecycle.supervisor(Path(lab.state))

    def kill(self, broker: int) -> None:
        """SIGKILL broker number `broker`; it stays dead until `start`.

        Raises:
            NotRunning: The brokers are not the lab's own.
        """
        self._supervisor().kill_program(f"broker-{broker}")

    def start(self, broker: int) -> None:
        """Start broker number `broker` again.

        Raises:
            NotRunning: The brokers are not the lab's own.
        """
        self._supervisor().start_program(f"broker-{broker}")

    @contextmanager
    def paused(self, *brokers: int) -> Iterator[None]:
        """SIGSTOP brokers until the block ends: alive, connected and silent, as in a long garbage collection.

        Raises:
            NotRunning: The brokers are not the lab's own.
        """
        supervisor = self._supervisor()
        try:
            for broker in brokers:
                supervisor.signal_program(f"broker-{broker}", "STOP")
            yield
        finally:
            for broker in brokers:
                supervisor.signal_program(f"broker-{broker}", "CONT")

    def pid(self, broker: int) -> int:
        """The process id of broker number `broker`, 0 while it is dead.

        Raises:
            NotRunning: The brokers are not the lab's own.
        """
        return next((told["pid"] for told in self._supervisor().processes() if told["name"] == f"broker-{broker}"), 0)


@dataclass(frozen=True)
class Topic:
    """A lesson under way.

    Args:
        name: The lesson's name.
        namespace: Its Kubernetes namespace, or "".
        prefix: What its Kafka topics' names begin with.
        bootstrap: Bootstrap servers as the notebook sees them.
        bootstrap_pods: The same as a Pod sees them; empty where Pods cannot reach them.
        embedded: Whether everything it runs on is the lab's own.
    """

    name: str
    namespace: str = ""
    prefix: str = ""
    bootstrap: list[str] = field(default_factory=list)
    bootstrap_pods: list[str] = field(default_factory=list)
    embedded: bool = True

    @property
    def brokers(self) -> Brokers:
        """The brokers, to be killed and brought back."""
        return Brokers(embedded=not settings.own().brokers)

    def image(self, image: str) -> str:
        """The full name of a demo image, e.g. of "shop:v1"."""
        return images.name(image)

    def load(self, url: str, *, period: float = 0.02, limit: float = 120.0, timeout: float = 2.0, keep_alive: str = "half") -> Load:
        """Send requests from a Pod inside the cluster, on a fixed schedule, until the block ends.

        Args:
            url: Where to, as a Pod sees it, e.g. "http://shop/".
            period: Seconds from one request to the next.
            limit: Seconds after which it ends by itself.
            timeout: Seconds after which a request has failed.
            keep_alive: "none" opens a connection per request, "all" reuses those that rest, "half" alternates.
        """
        return Load(self.namespace, self.image("client:v1"), url, period=period, limit=limit, timeout=timeout, keep_alive=keep_alive)

    def watch(self) -> Watch:
        """Record every change of the namespace's Pods and EndpointSlices until the block ends."""
        return Watch(self.namespace)

    def clean_up(self) -> None:
        """Delete the namespace and the topics, and say so."""
        if self.namespace:
            client.CoreV1Api().delete_namespace(self.namespace)
        if self.bootstrap:
            _delete_topics(self.bootstrap, self.prefix)
        print(f"Cleaned up: {' and '.join(['the namespace'] * bool(self.namespace) + ['the topics'] * bool(self.bootstrap))}.")


def start(name: str, *, cluster: bool = False, brokers: bool = False) -> Topic:
    """Start a lesson: a fresh namespace and topic prefix, KUBECONFIG and PATH set, and a line on what it runs on.

    Args:
        name: The lesson's name, e.g. "rolling-update".
        cluster: Whether it needs a cluster.
        brokers: Whether it needs brokers.

    Raises:
        LabError: What it needs is not there.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise LabError(f"{name!r} cannot name a lesson.", "Use lower-case letters, digits and hyphens, at most 40.")
    own = settings.own()
    lab = settings.find()
    os.environ.update(found := access.variables(cluster=cluster, brokers=brokers))
    if cluster and "KUBECONFIG" not in found:
        raise NotRunning(
            "This lesson needs a cluster, and the lab that is up has none.",
            "Take it down with `lab down` and start it as root, or name one with LAB_CLUSTER.",
        )
    if brokers and "BOOTSTRAP" not in found:
        raise NotRunning(
            "This lesson needs brokers, and the lab that is up has none.",
            "Take it down with `lab down` and start it with `lab up`, or name some with LAB_BROKERS.",
        )
    suffix = secrets.token_hex(3)
    runs_on, namespace = [], ""
    if cluster:
        config.load_kube_config(found["KUBECONFIG"])
        namespace = f"{name}-{suffix}"
        runs_on.append(_fresh_namespace(name, namespace))
    bootstrap, for_pods = [], []
    if brokers:
        bootstrap = found["BOOTSTRAP"].split(",")
        for_pods = bootstrap if own.brokers else [server for server in (lab.bootstrap_pods if lab else "").split(",") if server]
        runs_on.append(_fresh_topics(name, bootstrap))
    use_pipes()
    print(f"Runs on {' and '.join(runs_on)}.")
    return Topic(name, namespace, f"{name}-{suffix}-", bootstrap, for_pods, not (own.cluster or own.brokers))


def _fresh_namespace(name: str, namespace: str) -> str:
    api = client.CoreV1Api()
    labels = {TOPIC: name, OWNER: _owner()}
    for left in api.list_namespace(label_selector=",".join(f"{key}={value}" for key, value in labels.items())).items:
        if left.status.phase == "Active":
            api.delete_namespace(left.metadata.name)
    api.create_namespace({"metadata": {"name": namespace, "labels": labels}})
    config.kube_config.load_kube_config(os.environ["KUBECONFIG"])
    end = time.monotonic() + 20
    while not client.CoreV1Api().list_namespaced_service_account(namespace, field_selector="metadata.name=default").items:
        if time.monotonic() > end:
            raise NotRunning(
                f"The namespace {namespace} got no default service account within 20 s.", "See `lab logs kube-controller-manager`."
            )
        time.sleep(0.05)
    version = client.VersionApi().get_code().git_version
    return f"Kubernetes {version} with {len(api.list_node().items)} nodes"


def _fresh_topics(name: str, bootstrap: list[str]) -> str:
    from kafka import KafkaAdminClient

    _delete_topics(bootstrap, f"{name}-", only=re.compile(rf"{re.escape(name)}-[0-9a-f]{{6}}-"))
    with closing(KafkaAdminClient(bootstrap_servers=bootstrap)) as admin:
        return f"Kafka with {len(admin.describe_cluster()['brokers'])} brokers"


def _delete_topics(bootstrap: list[str], prefix: str, only: re.Pattern | None = None) -> None:
    from kafka import KafkaAdminClient

    with closing(KafkaAdminClient(bootstrap_servers=bootstrap)) as admin:
        doomed = [topic for topic in admin.list_topics() if topic.startswith(prefix) and (only is None or only.match(topic))]
        if doomed:
            admin.delete_topics(doomed)
