"""Three Kafka brokers on loopback, one KRaft quorum: each process is a broker and a controller.

The Kafka client takes half a second to import, so the functions that need it do it, and `lab up` on a running lab stays fast.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from lab import settings
from lab.errors import BuildFailed, Unhealthy
from lab.jars import LOG4J, AotCache, Jars, java, write_properties
from lab.supervise import Program

JARS = Jars(f"kafka-{settings.KAFKA}", f"Kafka {settings.KAFKA}", settings.ENV / "kafka" / "jgo.lock.toml")
ROOTS = (f"org.apache.kafka:kafka_2.13:{settings.KAFKA}", LOG4J)
"""What the lock is written from: `python -c "from lab import brokers; brokers.JARS.write_lock(brokers.ROOTS)"`."""

MAIN = "kafka.Kafka"
JVM = (
    "-Xms48m",
    "-Xmx160m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseCompactObjectHeaders",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
)
"""Three brokers share a small machine: a small heap, and compilers that start fast; a killed JVM would leave its performance data in /tmp.
The AOT cache holds for these flags only."""

HOST = "127.0.0.1"
CONTROLLER, PODS = 100, 200
"""What is added to a broker's port for its controller's, and for the listener that Pods use."""
READ_LOGS = "Read `lab logs broker-1`, `lab logs broker-2` and `lab logs broker-3`."


def ports(pods_address: str | None) -> list[tuple[str, int]]:
    """Every (address, port) that the brokers bind; `pods_address` is the bridge's own address, or None without a cluster."""
    local = [(HOST, port + more) for port in _client_ports() for more in (0, CONTROLLER)]
    return local + [(pods_address, port + PODS) for port in _client_ports() if pods_address]


def bootstrap() -> str:
    """The bootstrap servers as a notebook sees them, comma-separated."""
    return ",".join(f"{HOST}:{port}" for port in _client_ports())


def bootstrap_pods(address: str) -> str:
    """The bootstrap servers as a Pod sees them, comma-separated, on the bridge's `address`."""
    return ",".join(f"{address}:{port + PODS}" for port in _client_ports())


def prepare(report: Callable[[str], None] = lambda line: None) -> None:
    """Fetch the jars that LOCK names and make the AOT cache; nothing to do, and no network, when both are there.

    One caller at a time. Whatever was interrupted is done again.

    Args:
        report: Called with a line of progress.

    Raises:
        BuildFailed: A jar could not be fetched or is not the one that was locked, or the disk is full.
    """
    JARS.fetch(report)
    home = JARS.home
    if not (home / "template").is_dir() or not _aot_cache().path.exists():
        report("Kafka: one start to learn from, for the AOT cache")
        try:
            _rehearse(home)
        except OSError as error:
            raise BuildFailed(f"Kafka's first start could not be prepared: {error}.", "Free some space, then try again.") from None


def programs(state: Path, pods_address: str | None, user: str = "") -> list[Program]:
    """The three brokers as programs, their storage formatted under `state` unless an earlier lab did.

    Args:
        state: The lab's state folder.
        pods_address: Address of the bridge, where Pods reach the brokers, or None without a cluster.
        user: The user to run as; "" keeps the caller's.
    """
    result = []
    for number, port in zip(settings.BROKER_IDS, _client_ports(), strict=True):
        folder = state / f"broker-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        listeners = {"CLIENT": (HOST, port), "CONTROLLER": (HOST, port + CONTROLLER)}
        if pods_address:
            listeners["PODS"] = (pods_address, port + PODS)
        voters = [(other, other_port + CONTROLLER) for other, other_port in zip(settings.BROKER_IDS, _client_ports(), strict=True)]
        write_properties(folder / "server.properties", _configuration(number, listeners, voters, folder / "data"))
        _format(folder / "data", number)
        if user:
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, user)
        result.append(
            Program(
                name=f"broker-{number}",
                command=java(MAIN, str(folder / "server.properties"), jvm=(*JVM, *_aot_cache().jvm)),
                environment=JARS.environment,
                user=user,
                stop_seconds=3,  # An orderly stop takes half a second; the last broker has no quorum to sign off at and would wait for minutes.
            )
        )
    return result


def standing() -> dict[int, str]:
    """Each registered broker's standing, by its id: "leads the quorum", "in the quorum" or "fenced"; empty when none answers."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        with closing(KafkaAdminClient(bootstrap_servers=bootstrap().split(","), bootstrap_timeout_ms=2000)) as admin:
            quorum = admin.describe_metadata_quorum()["topics"][0]["partitions"][0]
            registered = admin.describe_cluster()["brokers"]
    except KafkaError:
        return {}
    leader = quorum["leader_id"]
    return {
        broker["broker_id"]: "fenced" if broker["is_fenced"] else "leads the quorum" if broker["broker_id"] == leader else "in the quorum"
        for broker in registered
    }


def wait_ready(limit: float) -> None:
    """Wait until all three brokers are registered and unfenced.

    Args:
        limit: Seconds.

    Raises:
        Unhealthy: They were not within the limit.
    """
    end = time.monotonic() + limit
    for port in _client_ports():
        _wait_port(port, end)
    while sorted(number for number, state in standing().items() if state != "fenced") != list(settings.BROKER_IDS):
        if time.monotonic() > end:
            known = ", ".join(f"{number} {state}" for number, state in standing().items()) or "none"
            raise Unhealthy(f"The Kafka brokers did not form a cluster within {limit:.0f} s (registered: {known}).", READ_LOGS)
        time.sleep(0.05)


def _client_ports() -> list[int]:
    return [settings.BROKER_PORT + index for index in range(len(settings.BROKER_IDS))]


def _aot_cache() -> AotCache:
    return JARS.aot_cache(MAIN, JVM)


def _rehearse(home: Path) -> None:
    """Format and run one broker by itself: its formatted storage is the template for the others, its classes become the AOT cache.

    Raises:
        BuildFailed: Kafka's own tool could not format the storage.
    """
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

    environment = os.environ | JARS.environment
    draft = home / "rehearsal"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    port, controller = _free_ports(2)
    properties = draft / "server.properties"
    write_properties(
        properties, _configuration(1, {"CLIENT": (HOST, port), "CONTROLLER": (HOST, controller)}, [(1, controller)], draft / "data")
    )
    cluster_id = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    tool = subprocess.run(
        java("kafka.tools.StorageTool", "format", "--cluster-id", cluster_id, "--config", str(properties), jvm=JVM),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if tool.returncode:
        raise BuildFailed(
            f"Kafka's storage could not be formatted: {(tool.stderr or tool.stdout).strip()[-300:]}.",
            "Try `lab doctor`; free space or memory may be short.",
        )
    shutil.rmtree(home / "template", ignore_errors=True)
    shutil.copytree(draft / "data", draft / "template")
    (draft / "template").rename(home / "template")
    with open(draft / "broker.log", "wb") as log:
        broker = subprocess.Popen(
            java(MAIN, str(properties), jvm=(*JVM, *_aot_cache().learn(draft))),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_port(port, time.monotonic() + 60)
        with closing(KafkaProducer(bootstrap_servers=f"{HOST}:{port}")) as producer:
            producer.bootstrap_connected()
        broker.send_signal(signal.SIGTERM)
        broker.wait(timeout=120)
        _aot_cache().keep(draft)
    except (KafkaError, OSError, subprocess.TimeoutExpired, Unhealthy):
        _aot_cache().forgo()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(broker.pid, signal.SIGKILL)
        broker.wait()
        shutil.rmtree(draft, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    numbers = [open_socket.getsockname()[1] for open_socket in sockets]
    for open_socket in sockets:
        open_socket.close()
    return numbers


def _wait_port(port: int, end: float) -> None:
    """Wait until something accepts connections on a loopback port, or raise Unhealthy at `end` (monotonic seconds)."""
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise Unhealthy(f"No Kafka broker answers on {HOST}:{port}.", READ_LOGS) from None
            time.sleep(0.02)


def _format(data: Path, number: int) -> None:
    """Give a broker the storage that Kafka's tool formatted once, under its own ids: no JVM has to start for it."""
    if data.exists():
        return
    draft = data.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(JARS.home / "template", draft)
    properties = draft / "meta.properties"
    own = {"node.id": str(number), "directory.id": base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")}
    known = dict(line.split("=", 1) for line in properties.read_text().splitlines() if "=" in line)
    write_properties(properties, {**known, **own})
    draft.rename(data)


def _configuration(
    number: int,
    listeners: Mapping[str, tuple[str, int]],
    voters: Sequence[tuple[int, int]],
    data: Path,
) -> dict[str, object]:
    """The broker's server.properties (https://kafka.apache.org/44/configuration/broker-configs/): what differs from Kafka's defaults.

    Args:
        number: Its node id.
        listeners: Address and port by listener name.
        voters: Node id and port of each controller.
        data: Folder of its logs.
    """
    addresses = {name: f"{name}://{address}:{port}" for name, (address, port) in listeners.items()}
    copies = len(voters)
    return {
        "node.id": number,
        "process.roles": "broker,controller",
        "controller.quorum.voters": ",".join(f"{voter}@{HOST}:{port}" for voter, port in voters),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "CLIENT",
        "listeners": ",".join(addresses.values()),
        "advertised.listeners": ",".join(address for name, address in addresses.items() if name != "CONTROLLER"),
        "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in listeners),
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "default.replication.factor": copies,
        "min.insync.replicas": min(2, copies),
        # A dead broker is noticed after 3 s, where the default of 9 s suits networks that pause: a lesson should not wait for it.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        # A group's first member need not wait 3 s for others.
        "group.initial.rebalance.delay.ms": 0,
        # Kafka's own topics: three partitions where 50 are for large clusters, copied like all others.
        **{f"{topic}.num.partitions": 3 for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")},
        **{f"{topic}.replication.factor": copies for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")},
        **{f"{topic}.min.isr": min(2, copies) for topic in ("transaction.state.log", "share.coordinator.state.topic")},
        # Out of the heap at start; the default is 128 MiB.
        "log.cleaner.dedupe.buffer.size": 4 << 20,
    }
