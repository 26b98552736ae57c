"""What a lesson may do to the embedded lab alone: end a broker, cut a node's power, look into etcd."""

from __future__ import annotations

import base64
import functools
import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from lab import cluster, lifecycle, network, settings
from lab.checks import wait
from lab.errors import NotRunning, Unhealthy
from lab.settings import Lab

ETCD_PORT = 2379


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


def _own_cluster(embedded: bool, does: str) -> Lab:
    lab = settings.find()
    if not embedded or lab is None or not lab.nodes:
        raise NotRunning(
            f"This experiment {does}, which only the lab's own cluster is there for.",
            "Run it without LAB_CLUSTER, on a cluster started by `lab up`.",
        )
    return lab


@dataclass(frozen=True)
class Nodes:
    """The embedded nodes, to lose their power and get it back. Nodes of your own are not touched."""

    embedded: bool

    def _supervisor(self):
        _own_cluster(self.embedded, "cuts a node's power")
        return lifecycle.nodes()

    def kill(self, name: str) -> None:
        """Cut the power of a node: every process on it is gone at once, what is on its disk stays.

        Raises:
            NotRunning: There is no such node, or the cluster is not the lab's own.
        """
        self._supervisor().kill_program(name)

    def start(self, name: str) -> None:
        """Start a node that was killed.

        Raises:
            NotRunning: There is no such node, or the cluster is not the lab's own.
        """
        self._supervisor().start_program(name)

    def restart(self, name: str) -> None:
        """Cut the power of a node and start it again.

        Raises:
            NotRunning: There is no such node, or the cluster is not the lab's own.
        """
        self._supervisor()
        lifecycle.restart_node(name)


@dataclass(frozen=True)
class ControlPlane:
    """The embedded control plane. That of a cluster of your own is not touched."""

    embedded: bool

    def etcd(self, key: str) -> bytes | None:
        """The value that lies under a key in etcd, as bytes; None if there is none.

        It asks etcd itself, over its JSON gateway (https://etcd.io/docs/v3.6/dev-guide/api_grpc_gateway/), with a certificate of the lab's.

        Args:
            key: E.g. "/registry/secrets/NAMESPACE/NAME".

        Raises:
            NotRunning: The cluster is not the lab's own.
            Unhealthy: etcd refused.
        """
        lab = _own_cluster(self.embedded, "looks into etcd")
        credentials = Path(lab.state) / "etcd.pem"
        context = ssl.create_default_context(cafile=credentials)
        context.load_cert_chain(credentials)
        connection = http.client.HTTPSConnection(network.address(lab.subnet, 2), ETCD_PORT, timeout=10, context=context)
        connection.request("POST", "/v3/kv/range", json.dumps({"key": base64.b64encode(key.encode()).decode()}))
        response = connection.getresponse()
        told = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise Unhealthy(f"etcd refused to read {key}: {told.get('message', response.status)}.", "See `lab logs etcd`.")
        return base64.b64decode(told["kvs"][0]["value"]) if told.get("kvs") else None

    def encrypt(self, configuration: dict | None) -> None:
        """Hand the API server an EncryptionConfiguration and wait until it serves with it.

        The API server is started anew, as https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/ asks. What an earlier
        configuration has encrypted is decrypted first: a key that is gone would lock its Secrets, and the API server with them.

        Args:
            configuration: The object; None goes back to storing Secrets as they are.

        Raises:
            NotRunning: The cluster is not the lab's own.
            TimedOut: The API server did not come back.
        """
        lab = _own_cluster(self.embedded, "changes how the API server stores Secrets")
        machine = cluster.machines(Path(lab.state), lab.subnet, lab.nodes)[0]
        target = machine.etc / "kubernetes" / cluster.ENCRYPTION
        plain = cluster.encryption([{"identity": {}}])
        run = functools.partial(cluster.kubectl, lab.kubeconfig)

        def serve_with(wanted: dict) -> None:
            target.write_text(yaml.safe_dump(wanted))
            machine.supervisor.kill_program("kube-apiserver")
            machine.supervisor.start_program("kube-apiserver")
            wait("the API server to serve again", lambda: run("get", "--raw=/readyz").returncode == 0)

        def rewritten() -> bool:
            """Write every Secret once more; one that is changed or deleted meanwhile asks for another round."""
            secrets = run("get", "secrets", "--all-namespaces", "-o", "json").stdout
            return run("replace", "-f", "-", stdin=secrets).returncode == 0

        earlier = yaml.safe_load(target.read_text())
        if earlier != plain:
            serve_with(cluster.encryption([{"identity": {}}, *(one for one in _providers(earlier) if "identity" not in one)]))
            wait("every Secret to be stored as it is", rewritten)
            serve_with(plain)
        if configuration:
            serve_with(configuration)


def _providers(configuration: dict) -> list[dict]:
    return [provider for told in configuration["resources"] for provider in told["providers"]]
