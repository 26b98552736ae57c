"""Kafka as it was installed until version 4: three ZooKeeper servers and three brokers on loopback, for the length of a lesson.

The clients take a while to import, so the functions that need them do it, and `import lab` stays fast.
"""

from __future__ import annotations

import logging
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from lab import addons, settings
from lab.brokers import HOST, JVM
from lab.errors import LabError, NotRunning, TimedOut, Unhealthy
from lab.jars import AotCache, Jars, java, write_properties
from lab.registry import MANAGER

NUMBERS = (1, 2, 3)
PORTS = range(10000, 19000)
"""Below those that Linux gives to outgoing connections: a client that tries a dead broker's port must not meet itself there."""
ZOOKEEPER, BROKER = "org.apache.zookeeper.server.quorum.QuorumPeerMain", "kafka.Kafka"
SESSION_MS = 3000
"""zookeeper.session.timeout.ms of the brokers, as broker.session.timeout.ms of the lab's own."""
PATIENCE = 180.0
"""Seconds that a start may take; it takes four on two idle cores."""


@dataclass
class Ensemble:
    """The servers `zookeeper-1` to `zookeeper-3` and the brokers `broker-1` to `broker-3`: child processes, which end with their parent.

    Start them from the main thread: Linux ends them with the thread that started them.

    Args:
        folder: What they write, and their logs, `broker-1.log` and so on; gone at the end.
        lock: Held while this process lives: a folder whose lock nobody holds is removed by the next start.
    """

    folder: Path
    lock: FileLock
    _processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @classmethod
    def up(cls) -> Ensemble:
        """Start all six and wait until the brokers have registered.

        Raises:
            Unhealthy: One of them ended, or there are no free ports.
            TimedOut: They did not get ready.
        """
        with FileLock(settings.cache() / "ensemble-aot.lock"):
            if not all(_aot_cache(main).path.exists() for main in (ZOOKEEPER, BROKER)):
                rehearsal = cls._fresh()
                try:
                    rehearsal._begin(learn=True)
                    rehearsal._learn()
                finally:
                    rehearsal.end()
        ensemble = cls._fresh()
        try:
            ensemble._begin()
        except BaseException:
            ensemble.end()
            raise
        return ensemble

    @classmethod
    def _fresh(cls) -> Ensemble:
        """One with a folder of its own, and nothing started; what others left behind is removed."""
        parent = settings.cache() / "ensembles"
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent.with_suffix(".lock")):
            for folder in parent.iterdir():
                with suppress(Timeout), FileLock(folder / "lock").acquire(timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=parent))
            lock = FileLock(folder / "lock")
            lock.acquire(timeout=0)
        return cls(folder, lock)

    @cached_property
    def _ports(self) -> list[int]:
        free: list[int] = []
        for port in random.sample(PORTS, len(PORTS)):
            with suppress(OSError), socket.create_server((HOST, port)):
                free.append(port)
            if len(free) == 4 * len(NUMBERS):
                return free
        raise Unhealthy(f"Too few ports from {PORTS.start} to {PORTS.stop} are free on {HOST}.", "End what holds them.")

    def _addresses(self, kind: int) -> list[str]:
        """Kind 0 and 1 are for clients, of ZooKeeper and of the brokers; 2 and 3 for ZooKeeper's followers and votes."""
        return [f"{HOST}:{port}" for port in self._ports[kind * len(NUMBERS) :][: len(NUMBERS)]]

    @property
    def zookeeper(self) -> list[str]:
        """The addresses of the ZooKeeper servers, number 1 first."""
        return self._addresses(0)

    @property
    def bootstrap(self) -> list[str]:
        """The addresses of the brokers, number 1 first."""
        return self._addresses(1)

    @property
    def names(self) -> list[str]:
        """The names of all six, ZooKeeper first."""
        return [f"{kind}-{number}" for kind in ("zookeeper", "broker") for number in NUMBERS]

    def pid(self, name: str) -> int:
        """The process id of one of the six, 0 while it is dead.

        Raises:
            LabError: There is none of that name.
        """
        if name not in self.names:
            raise LabError(f"There is no process {name!r}.", f"There are: {', '.join(self.names)}.")
        process = self._processes.get(name)
        return process.pid if process and process.poll() is None else 0

    def kill(self, name: str) -> None:
        """SIGKILL one of the six; it stays dead until `start`.

        Raises:
            LabError: There is none of that name, or it is dead.
        """
        if not self.pid(name):
            raise NotRunning(f"{name} is dead already.", f'Start it with start("{name}").')
        self._processes[name].kill()
        self._processes[name].wait()

    def start(self, name: str, override: Mapping[str, object] | None = None) -> None:
        """Start one of the six that is dead, and do not wait for it.

        Args:
            name: Its name.
            override: For a broker: settings that differ from its server.properties, for this start.

        Raises:
            LabError: There is none of that name, or it is running.
        """
        if self.pid(name):
            raise LabError(f"{name} is running already.", f'End it with kill("{name}").')
        self._run(name, [word for key, value in (override or {}).items() for word in ("--override", f"{key}={value}")])

    def _run(self, name: str, arguments: list[str], *, learn: bool = False) -> None:
        main = BROKER if name.startswith("broker") else ZOOKEEPER
        cache = _aot_cache(main)
        jvm = (*JVM, *(cache.learn(self.folder) if learn else cache.jvm))
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [*MANAGER, *java(main, str(self.folder / f"{name}.properties"), *arguments, jvm=jvm)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_jars().environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def _begin(self, *, learn: bool = False) -> None:
        """Configure and start all six, and wait."""
        servers = {
            f"server.{number}": f"{follower}:{vote.rpartition(':')[2]};{client}"
            for number, client, follower, vote in zip(NUMBERS, *map(self._addresses, (0, 2, 3)), strict=True)
        }
        for number, address in zip(NUMBERS, self.bootstrap, strict=True):
            data = self.folder / f"zookeeper-{number}"
            data.mkdir()
            (data / "myid").write_text(str(number))
            write_properties(self.folder / f"zookeeper-{number}.properties", _zookeeper(data) | servers)
            data = self.folder / f"broker-{number}"
            write_properties(self.folder / f"broker-{number}.properties", _broker(number, address, self.zookeeper, data))
        for name in self.names:
            self._run(name, [], learn=learn and name.endswith("1"))
        self._wait()

    def _wait(self) -> None:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError
        from kazoo.client import KazooClient
        from kazoo.exceptions import KazooException
        from kazoo.handlers.threading import KazooTimeoutError

        silent = logging.Logger("ensemble", logging.CRITICAL)  # It would tell of each attempt that comes too early.
        client = KazooClient(",".join(self.zookeeper), logger=silent)
        end = time.monotonic() + PATIENCE
        try:
            while time.monotonic() < end:
                for name in self._processes:
                    if not self.pid(name):
                        raise Unhealthy(f"{name} ended at its start: {self._last_words(name)}.", "Look whether memory or disk is short.")
                with suppress(KazooException, KazooTimeoutError):
                    if not client.connected:
                        client.start(timeout=1)
                    if len(client.get_children("/brokers/ids")) == len(NUMBERS) and client.exists("/controller"):
                        break
                time.sleep(0.05)
        finally:
            client.stop()
            client.close()
        waiting = self.bootstrap  # For the controller to have told each broker of all others.
        while waiting and time.monotonic() < end:
            with suppress(KafkaError), closing(KafkaAdminClient(bootstrap_servers=waiting[0], bootstrap_timeout_ms=2000)) as admin:
                if len(admin.describe_cluster()["brokers"]) == len(NUMBERS):
                    waiting = waiting[1:]
        if not waiting:
            return
        raise TimedOut(f"ZooKeeper and its brokers were not ready within {PATIENCE:.0f} s.", "See what else keeps the machine busy.")

    def _last_words(self, name: str) -> str:
        told = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        failed = (line for line in told if "Exception" in line and " WARN " not in line)
        return next(failed, told[-1] if told else "it said nothing")

    def _learn(self) -> None:
        """Stop one of each in order, for its AOT cache."""
        for name, main in (("broker-1", BROKER), ("zookeeper-1", ZOOKEEPER)):
            self._processes[name].terminate()
            try:
                self._processes[name].wait(timeout=120)
                _aot_cache(main).keep(self.folder)
            except subprocess.TimeoutExpired:
                _aot_cache(main).forgo()

    def end(self) -> None:
        """End all six; what they wrote is gone."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()


def _jars() -> Jars:
    return addons.every()["zookeeper"].jars


def _aot_cache(main: str) -> AotCache:
    return _jars().aot_cache(main, JVM)


def _zookeeper(data: Path) -> dict[str, object]:
    """The server's configuration (https://zookeeper.apache.org/doc/r3.9.5/zookeeperAdmin.html#sc_configuration).

    Args:
        data: Its folder.
    """
    return {
        "dataDir": data,
        # A session ends at a tick: a short one ends it soon after its timeout. It may be as short as two ticks.
        "tickTime": 500,
        "initLimit": 40,
        "syncLimit": 10,
        # A web server on every address otherwise.
        "admin.enableServer": "false",
    }


def _broker(number: int, address: str, zookeeper: list[str], data: Path) -> dict[str, object]:
    """The broker's server.properties (https://kafka.apache.org/39/documentation.html#brokerconfigs): what differs from Kafka's defaults.

    Args:
        number: Its id.
        address: Where clients and brokers reach it.
        zookeeper: The servers that keep its metadata.
        data: Folder of its logs.
    """
    return {
        "broker.id": number,
        "zookeeper.connect": ",".join(zookeeper),
        "zookeeper.session.timeout.ms": SESSION_MS,
        # The session's timeout otherwise: a broker would give up before three servers have started on a slow machine.
        "zookeeper.connection.timeout.ms": int(PATIENCE * 1000),
        "listeners": f"PLAINTEXT://{address}",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "default.replication.factor": len(NUMBERS),
        "min.insync.replicas": 2,
        "group.initial.rebalance.delay.ms": 0,
        "offsets.topic.num.partitions": 3,
        # Out of the heap at start; the default is 128 MiB.
        "log.cleaner.dedupe.buffer.size": 4 << 20,
    }
