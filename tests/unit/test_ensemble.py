"""ZooKeeper and its brokers for the length of a lesson: on loopback only, and gone with the process that started them."""

import signal
import stat
import subprocess
import sys

import psutil
import pytest
from kafka import KafkaAdminClient

from lab import addons, ensemble
from lab.checks import wait
from lab.ensemble import Ensemble
from lab.errors import LabError, NotRunning, Unhealthy
from lab.report import Report

KERNEL = """
from lab.ensemble import Ensemble
one = Ensemble.up()
print(one.folder, *(one.pid(name) for name in one.names), flush=True)
input()
"""


@pytest.fixture(scope="module", autouse=True)
def prepared():
    addons.prepare(Report(quiet=True), addons.named(["zookeeper"]))


@pytest.fixture(scope="module")
def running():
    one = Ensemble.up()
    yield one
    one.end()


def test_three_servers_and_three_brokers_answer(running):
    with KafkaAdminClient(bootstrap_servers=running.bootstrap) as admin:
        assert sorted(broker["broker_id"] for broker in admin.describe_cluster()["brokers"]) == [1, 2, 3]
    assert len({running.pid(name) for name in running.names} - {0}) == 6


def test_they_listen_on_loopback_alone(running):
    for name in running.names:
        sockets = psutil.Process(running.pid(name)).net_connections("inet")
        addresses = {one.laddr.ip.removeprefix("::ffff:") for one in sockets if one.status == psutil.CONN_LISTEN}
        assert addresses == {"127.0.0.1"}, name


def test_nobody_else_reads_their_folder_or_takes_it_away(running):
    assert stat.S_IMODE(running.folder.stat().st_mode) == 0o700
    other = Ensemble._fresh()
    assert running.folder.exists() and other.folder.exists()
    other.end()
    assert not other.folder.exists()


def test_one_is_killed_and_comes_back_with_another_setting(running):
    before = running.pid("broker-3")
    running.kill("broker-3")
    assert not running.pid("broker-3") and not psutil.pid_exists(before)
    with pytest.raises(NotRunning, match="dead already"):
        running.kill("broker-3")
    running.start("broker-3", {"zookeeper.session.timeout.ms": 4321})
    assert running.pid("broker-3") not in (0, before)
    with pytest.raises(LabError, match="running already"):
        running.start("broker-3")
    with pytest.raises(LabError, match=r"There are: zookeeper-1, .*broker-3"):
        running.start("broker-4")
    wait("the setting", lambda: "sessionTimeout=4321" in (running.folder / "broker-3.log").read_text(), limit=30)


def test_a_kernel_that_is_killed_leaves_nothing():
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder, *pids = kernel.stdout.readline().split()
    assert len(pids) == 6 and all(psutil.pid_exists(int(pid)) for pid in pids)
    kernel.send_signal(signal.SIGKILL)
    kernel.communicate()
    wait("the processes to end", lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), limit=20)
    Ensemble._fresh().end()
    assert not ensemble.Path(folder).exists()


def test_a_broker_that_cannot_start_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(ensemble, "_broker", lambda *_: {"broker.id": "one", "zookeeper.connect": "127.0.0.1:1"})
    pids = set(psutil.pids())
    with pytest.raises(Unhealthy, match=r"^broker-[123] ended at its start: .*Invalid value one for configuration broker\.id"):
        Ensemble.up()
    left = [child for child in psutil.Process().children() if child.pid not in pids]
    assert not left
