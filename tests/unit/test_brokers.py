"""The brokers of the lab: what they are made of, how they are laid out on disk, and that they form a cluster."""

import shutil
import time
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from lab import brokers, settings
from lab.errors import BuildFailed, Unhealthy
from lab.supervise import Supervisor


@pytest.fixture(scope="module", autouse=True)
def prepared():
    brokers.prepare()


@pytest.fixture
def other_ports(monkeypatch):
    """Ports of their own, so that a running lab is not in the way."""
    monkeypatch.setattr(settings, "BROKER_PORT", 39092)


def properties(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def test_every_port_is_named_once():
    taken = brokers.ports("10.30.0.1")
    assert len(set(taken)) == len(taken) == 9
    assert len(brokers.ports(None)) == 6
    assert [address for address, _ in taken].count("10.30.0.1") == 3


def test_what_is_there_is_not_fetched_again(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    lines = []
    brokers.prepare(lines.append)
    assert lines == []


def test_without_a_network_one_clear_error_and_nothing_half_made(monkeypatch, tmp_path):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    with pytest.raises(BuildFailed, match="could not be downloaded"):
        brokers.prepare()
    assert not [folder for folder in tmp_path.iterdir() if folder.suffix != ".new"]


def test_a_changed_jar_is_not_run(monkeypatch, tmp_path):
    shutil.copytree(brokers.JARS.home, tmp_path / brokers.JARS.home.name)
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    brokers.prepare()
    jar = next((tmp_path / brokers.JARS.home.name / "jars").rglob("kafka-raft-*.jar"))
    jar.write_bytes(jar.read_bytes() + b"x")
    with pytest.raises(BuildFailed):
        brokers.prepare()


def test_brokers_start_without_the_aot_cache_too(monkeypatch, tmp_path):
    shutil.copytree(brokers.JARS.home, tmp_path / brokers.JARS.home.name, ignore=shutil.ignore_patterns("*.aot"))
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    brokers._aot_cache().forgo()
    brokers.prepare()
    assert not any("AOT" in word for program in brokers.programs(tmp_path / "state", None) for word in program.command)


def test_one_cluster_of_brokers_with_storage_of_their_own(tmp_path):
    brokers.programs(tmp_path, None)
    metas = [properties(tmp_path / f"broker-{number}" / "data" / "meta.properties") for number in settings.BROKER_IDS]
    assert [meta["node.id"] for meta in metas] == ["1", "2", "3"]
    assert len({meta["cluster.id"] for meta in metas}) == 1
    assert len({meta["directory.id"] for meta in metas}) == 3


def test_a_second_start_keeps_the_storage_and_takes_the_new_address(tmp_path):
    brokers.programs(tmp_path, None)
    meta = tmp_path / "broker-2" / "data" / "meta.properties"
    before = meta.read_text()
    brokers.programs(tmp_path, "10.30.0.1")
    assert meta.read_text() == before
    assert "PODS://10.30.0.1:19293" in properties(tmp_path / "broker-2" / "server.properties")["advertised.listeners"]


def test_a_format_that_was_interrupted_is_done_again(tmp_path):
    half = tmp_path / "broker-1" / "data.new"
    half.mkdir(parents=True)
    (half / "meta.properties").write_text("version=1\n")
    brokers.programs(tmp_path, None)
    assert properties(tmp_path / "broker-1" / "data" / "meta.properties")["node.id"] == "1"
    assert not half.exists()


def test_nobody_answers(other_ports):
    assert brokers.standing() == {}
    with pytest.raises(Unhealthy, match=r"127\.0\.0\.1:39092"):
        brokers.wait_ready(0.1)


def test_three_brokers_in_one_quorum_lose_one_and_get_it_back(other_ports, tmp_path):
    supervisor = Supervisor(tmp_path)
    supervisor.write(brokers.programs(tmp_path, None), settings.owner())
    supervisor.start({})
    try:
        brokers.wait_ready(60)
        assert sorted(brokers.standing()) == [1, 2, 3]
        assert list(brokers.standing().values()).count("leads the quorum") == 1
        with KafkaAdminClient(bootstrap_servers=brokers.bootstrap()) as admin:
            admin.create_topics(["t"], wait_for_metadata=True)
            assert len(admin.describe_topics(["t"])[0]["partitions"][0]["replica_nodes"]) == 3
        supervisor.kill_program("broker-2")
        assert {told["name"]: told["statename"] for told in supervisor.processes()}["broker-2"] == "STOPPED"
        end = time.monotonic() + 15
        while (standing := brokers.standing()).get(2) != "fenced":
            assert time.monotonic() < end, standing
        supervisor.start_program("broker-2")
        brokers.wait_ready(30)
    finally:
        supervisor.rpc.supervisor.shutdown()
        while supervisor.running():
            pass
