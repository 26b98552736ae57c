"""`env/compose.yaml`, run by Docker's engine and Compose from Debian's packages, with the images that the lab writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lab import brokers, compose, settings
from lab.report import Report

from .conftest import Docker

FILE = settings.ENV / "compose.yaml"
KRAFT = ("localhost:29092", "localhost:29093", "localhost:29094")
IN_2020 = ("localhost:29192", "localhost:29193", "localhost:29194")

ROUND_TRIP = """
import sys
from contextlib import closing, suppress
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from lab import wait

servers, name, count = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])

def whole(server):
    with suppress(KafkaError), closing(KafkaAdminClient(bootstrap_servers=server, bootstrap_timeout_ms=2000)) as admin:
        return len(admin.describe_cluster()["brokers"]) == 3

for server in servers:
    wait(f"{server} to know three brokers", lambda: whole(server), limit=120)
with KafkaProducer(bootstrap_servers=servers, bootstrap_timeout_ms=120_000, acks="all") as producer:
    with KafkaAdminClient(bootstrap_servers=servers) as admin:
        if name not in admin.list_topics():
            admin.create_topics({name: {"num_partitions": 6, "replication_factor": 3}}, wait_for_metadata=True)
        [topic] = admin.describe_topics([name])
    leaders = {partition["leader_id"] for partition in topic["partitions"]}
    futures = [producer.send(name, b"order") for _ in range(count)]
    receipts = [future.get(30) for future in futures]
with KafkaConsumer(bootstrap_servers=servers, group_id="readers") as consumer:
    partitions = [TopicPartition(name, number) for number in range(6)]
    there = sum(consumer.end_offsets(partitions).values())
print(len(receipts), there, *sorted(leaders))
"""


@pytest.fixture(scope="module")
def run(docker: Docker) -> Iterator[Callable[..., str]]:
    """Runs docker-compose on the file with the lab's own images; what is up at the end is taken down."""
    docker("/usr/bin/docker", "load", "--input", compose.archive(Report(quiet=True)))

    def run(*arguments: str) -> str:
        return docker("/usr/bin/docker-compose", "--project-name=by-experiment", "--file", FILE, *arguments, **compose.tags())

    yield run
    run("--profile", "zookeeper", "down", "--timeout=3")
    assert docker("/usr/bin/docker", "ps", "--all", "--quiet") == ""


def round_trip(docker: Docker, run: Callable[..., str], servers: tuple[str, ...], count: int) -> list[int]:
    """Write records to a topic on all three brokers: how many were acknowledged, how many are there, and who leads its partitions."""
    try:
        return [int(number) for number in docker.python(ROUND_TRIP, ",".join(servers), "orders", str(count)).split()]
    except AssertionError as error:
        error.add_note(run("--profile", "zookeeper", "logs", "--tail=15"))
        raise


def test_three_brokers_take_records_and_keep_them_when_one_is_killed(docker: Docker, run: Callable[..., str]) -> None:
    run("up", "--detach")
    assert round_trip(docker, run, KRAFT, 600) == [600, 600, 1, 2, 3]
    run("kill", "broker-2")
    run("start", "broker-2")
    assert round_trip(docker, run, KRAFT, 600)[:2] == [600, 1200]


def test_a_lesson_takes_them_in_place_of_the_labs_own(docker: Docker, run: Callable[..., str]) -> None:
    run("up", "--detach")
    round_trip(docker, run, KRAFT, 6)
    said = docker.python("import lab; lab.start('compose', brokers=True).clean_up()", LAB_BROKERS=",".join(KRAFT))
    assert said == "Runs on Kafka with 3 brokers.\nCleaned up: the topics.\n"


def test_the_profile_brings_the_brokers_of_2020_and_their_zookeeper(docker: Docker, run: Callable[..., str]) -> None:
    run("--profile", "zookeeper", "up", "--detach", "zookeeper", "broker-2020-1", "broker-2020-2", "broker-2020-3")
    assert round_trip(docker, run, IN_2020, 600) == [600, 600, 1, 2, 3]


def test_no_port_is_published_beyond_loopback() -> None:
    services = yaml.safe_load(FILE.read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert [port.split(":")[:2] for port in published] == [["127.0.0.1", server.split(":")[1]] for server in (*KRAFT, *IN_2020)]


def test_the_brokers_are_set_up_as_the_labs_own(tmp_path: Path) -> None:
    own = brokers._configuration(1, {"CLIENT": ("127.0.0.1", 1)}, [(1, 2), (2, 3), (3, 4)], tmp_path)
    told = yaml.safe_load(FILE.read_text())["services"]["broker-1"]["environment"]
    theirs = {name.removeprefix("KAFKA_").lower().replace("_", "."): str(value) for name, value in told.items()}
    places = re.compile(r"listener|voters|log\.dirs")
    same = {name: str(value) for name, value in own.items() if not places.search(name)}
    assert {name: theirs.get(name) for name in same} == same


def test_the_public_images_are_of_the_versions_that_the_lab_runs() -> None:
    images = set(re.findall(r"\$\{(\w+):-apache/kafka:([\d.]+)\}", FILE.read_text()))
    for variable, version in images:
        assert f"kafka_2.13-{version}.jar" in compose.lines()[variable].classpath
    assert {variable for variable, _ in images} == set(compose.tags())
