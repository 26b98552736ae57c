"""What a notebook starts with: a fresh namespace and topic prefix on whatever cluster and brokers there are."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from kubernetes import client, config

from lab import access, images, provision, settings
from lab import addons as provided
from lab.embedded import Brokers, ControlPlane, Nodes
from lab.ensemble import Ensemble
from lab.errors import LabError, NotRunning
from lab.load import Load
from lab.registry import Registry
from lab.report import Report
from lab.shell import use_pipes
from lab.watch import Watch

TOPIC, OWNER = "by-experiment/topic", "by-experiment/owner"


def _owner() -> str:
    return hashlib.sha256(f"{getpass.getuser()}@{socket.gethostname()}:{settings.CHECKOUT}".encode()).hexdigest()[:10]


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
        registry: The OCI registry of its own that it has started, if any.
        ensemble: The ZooKeeper servers and brokers of its own that it has started, if any.
    """

    name: str
    namespace: str = ""
    prefix: str = ""
    bootstrap: list[str] = field(default_factory=list)
    bootstrap_pods: list[str] = field(default_factory=list)
    embedded: bool = True
    registry: Registry | None = None
    ensemble: Ensemble | None = None

    @property
    def brokers(self) -> Brokers:
        """The brokers, to be killed and brought back."""
        return Brokers(embedded=not settings.own().brokers)

    @property
    def nodes(self) -> Nodes:
        """The nodes, to lose their power and get it back."""
        return Nodes(embedded=not settings.own().cluster)

    @property
    def control_plane(self) -> ControlPlane:
        """The control plane: what lies in etcd, and how Secrets are stored there."""
        return ControlPlane(embedded=not settings.own().cluster)

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
        self._need_cluster()
        return Load(self.namespace, self.image("client:v1"), url, period=period, limit=limit, timeout=timeout, keep_alive=keep_alive)

    def watch(self) -> Watch:
        """Record every change of the namespace's Pods and EndpointSlices until the block ends."""
        self._need_cluster()
        return Watch(self.namespace)

    def _need_cluster(self) -> None:
        if not self.namespace:
            raise NotRunning("This lesson was started without a cluster.", f"Write lab.start({self.name!r}, cluster=True).")

    def clean_up(self) -> None:
        """Delete the namespace and the topics, end what it has started, and say so."""
        for own in filter(None, (self.registry, self.ensemble)):
            own.end()
        if self.namespace:
            client.CoreV1Api().delete_namespace(self.namespace)
        if self.bootstrap:
            _delete_topics(self.bootstrap, self.prefix)
        print(f"Cleaned up: {' and '.join(['the namespace'] * bool(self.namespace) + ['the topics'] * bool(self.bootstrap))}.")


def start(name: str, *, cluster: bool = False, brokers: bool = False, addons: Sequence[str] = ()) -> Topic:
    """Start a lesson: a fresh namespace and topic prefix, KUBECONFIG and PATH set, and a line on what it runs on.

    Args:
        name: The lesson's name, e.g. "rolling-update".
        cluster: Whether it needs a cluster.
        brokers: Whether it needs brokers.
        addons: The add-ons that it needs, e.g. "storage" (`lab addon` lists them).

    Raises:
        LabError: What it needs is not there.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise LabError(f"{name!r} cannot name a lesson.", "Use lower-case letters, digits and hyphens, at most 40.")
    if isinstance(addons, str):
        raise LabError(f"addons={addons!r} is not a list.", f"Write addons=[{addons!r}].")
    provided.named(addons)
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
    if addons:
        provision.up(Report(quiet=all(one.prepared for one in provided.named(addons))), addons)
        os.environ.update(access.variables(cluster=cluster, brokers=brokers))
    if cluster:
        runs_on.append(_fresh_namespace(name, namespace))
    bootstrap, for_pods = [], []
    if brokers:
        bootstrap = found["BOOTSTRAP"].split(",")
        for_pods = bootstrap if own.brokers else [server for server in (lab.bootstrap_pods if lab else "").split(",") if server]
        runs_on.append(_fresh_topics(name, bootstrap))
    use_pipes()
    print(f"Runs on {' and '.join(runs_on)}.")
    registry = Registry.start() if "helm" in addons else None
    ensemble = Ensemble.up() if "zookeeper" in addons else None
    return Topic(name, namespace, f"{name}-{suffix}-", bootstrap, for_pods, not (own.cluster or own.brokers), registry, ensemble)


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
