"""Both client libraries produce, consume and commit transactions while every broker is restarted in turn: nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import confluent_kafka
import kafka
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from kafka.structs import OffsetAndMetadata

from lab import settings
from lab.supervise import Supervisor

from ..conftest import PORT, STATE, Lab, until

pytestmark = pytest.mark.slow
SERVERS = ",".join(f"127.0.0.1:{PORT + number}" for number in range(3))
PATIENCE = 120
ANSWER = 10
"""Seconds after which a call of kafka-python's that has no limit of its own is given up."""
RECORDS_BEFORE_NEXT = 30
"""What each client must have had acknowledged, and passed on in transactions, between two restarts."""


class Client(ABC):
    """One library: a writer with acks=all, and a pipeline that reads, passes on and commits in one transaction.

    Args:
        name: What its topics, its group and its transactional id begin with.
    """

    def __init__(self, name: str) -> None:
        self.source, self.target, self.group = f"{name}-in", f"{name}-out", f"{name}-group"
        self.acknowledged: set[int] = set()
        self.passed_on = 0
        self.failed: list[BaseException] = []
        self._ended, self._drained = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(run,)) for run in (self.write, self.pass_on)]

    @abstractmethod
    def write(self) -> None:
        """Write numbered records until told to end, and note which were acknowledged."""

    @abstractmethod
    def pass_on(self) -> None:
        """Consume, produce and commit, transaction by transaction, until nothing comes any more."""

    @abstractmethod
    def read(self, topic: str) -> list[int]:
        """Every committed record of a topic."""

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self.failed.append(error)
            raise

    def begin(self) -> None:
        """Start writing and passing on."""
        for thread in self._threads:
            thread.start()

    def numbers(self) -> Iterator[int]:
        """Some two hundred numbers a second, until told to end."""
        for number in itertools.count():
            if self._ended.wait(0.005):
                return
            yield number

    def goes_on(self) -> None:
        """Wait until more records were acknowledged and passed on than now."""
        acknowledged, passed_on = len(self.acknowledged) + RECORDS_BEFORE_NEXT, self.passed_on + RECORDS_BEFORE_NEXT
        until(lambda: self.failed or (len(self.acknowledged) >= acknowledged and self.passed_on >= passed_on), PATIENCE)
        assert not self.failed, self.failed

    def end(self) -> None:
        """End the writer, let the pipeline take the rest, and end it too."""
        try:
            self._ended.set()
            self._threads[0].join(PATIENCE)
            written = len(self.read(self.source))
            with contextlib.suppress(AssertionError):
                until(lambda: self.failed or self.passed_on >= written, PATIENCE)
        finally:
            self._drained.set()
            self._threads[1].join(PATIENCE)


class KafkaPython(Client):
    """kafka-python."""

    def write(self) -> None:
        """Write until told to end."""
        with kafka.KafkaProducer(bootstrap_servers=SERVERS, linger_ms=5) as producer:
            for number in self.numbers():
                producer.send(self.source, b"%d" % number).add_callback(lambda _, number=number: self.acknowledged.add(number))

    def _producer(self) -> kafka.KafkaProducer:
        end = time.monotonic() + PATIENCE
        while True:
            producer = kafka.KafkaProducer(bootstrap_servers=SERVERS, linger_ms=5, transactional_id=self.group)
            try:
                _within(ANSWER, producer.init_transactions)
                return producer
            except (kafka.errors.KafkaError, TimeoutError):
                self._abandon(producer)
                if time.monotonic() > end:
                    raise

    def pass_on(self) -> None:
        """Pass on until drained; after a transaction that fails, a new producer aborts it, and its records are read again.

        kafka-python 3.0.12 forgets a transaction's request when the connection to its coordinator breaks before it is sent
        (`Sender._maybe_send_pending_request` leaves its loop with `target_node` set and does not queue it again), and the
        call waits for ever. So the limit is this program's.
        """
        producer = self._producer()
        with kafka.KafkaConsumer(
            self.source,
            bootstrap_servers=SERVERS,
            group_id=self.group,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        ) as consumer:
            while not self._drained.is_set():
                found = consumer.poll(timeout_ms=200)
                if not found:
                    continue
                try:
                    producer.begin_transaction()
                    sent = [producer.send(self.target, record.value) for records in found.values() for record in records]
                    offsets = {where: OffsetAndMetadata(records[-1].offset + 1, "", -1) for where, records in found.items()}
                    _within(ANSWER, producer.send_offsets_to_transaction, offsets, consumer.group_metadata())
                    _within(ANSWER, producer.commit_transaction)
                    self.passed_on += len(sent)
                except (kafka.errors.KafkaError, TimeoutError):
                    self._abandon(producer)
                    producer = self._producer()
                    for where in consumer.assignment():
                        consumer.seek(where, consumer.committed(where) or 0)
        producer.close()

    @staticmethod
    def _abandon(producer: kafka.KafkaProducer) -> None:
        """Close a producer that cannot flush: its own `close` then raises an error and leaves its thread at work."""
        with contextlib.suppress(kafka.errors.KafkaError):
            producer.close(timeout=1)
        producer._sender.force_close()

    def read(self, topic: str) -> list[int]:
        """Read to the end as it is now."""
        with kafka.KafkaConsumer(bootstrap_servers=SERVERS, isolation_level="read_committed") as consumer:
            partitions = [kafka.TopicPartition(topic, number) for number in range(3)]
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            ends, found, limit = consumer.end_offsets(partitions), [], time.monotonic() + PATIENCE
            while any(consumer.position(one) < ends[one] for one in partitions):
                assert time.monotonic() < limit
                found += [int(record.value) for records in consumer.poll(timeout_ms=200).values() for record in records]
        return found


class Confluent(Client):
    """confluent-kafka."""

    def write(self) -> None:
        """Write until told to end."""
        producer = confluent_kafka.Producer({"bootstrap.servers": SERVERS, "enable.idempotence": True})
        for number in self.numbers():
            producer.produce(self.source, b"%d" % number, on_delivery=lambda error, _, n=number: error or self.acknowledged.add(n))
            producer.poll(0)
        assert producer.flush(PATIENCE) == 0

    def _producer(self) -> confluent_kafka.Producer:
        producer = confluent_kafka.Producer({"bootstrap.servers": SERVERS, "transactional.id": self.group})
        _insist(lambda: producer.init_transactions(PATIENCE))
        return producer

    def pass_on(self) -> None:
        """Pass on until drained; a transaction that fails is aborted, and its records are read again."""
        producer = self._producer()
        consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": SERVERS,
                "group.id": self.group,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        consumer.subscribe([self.source])
        while not self._drained.is_set():
            found = [message for message in consumer.consume(200, 0.2) if not message.error()]
            if not found:
                continue
            try:
                producer.begin_transaction()
                for message in found:
                    producer.produce(self.target, message.value())
                offsets = {message.partition(): message.offset() + 1 for message in found}
                after = [confluent_kafka.TopicPartition(self.source, *one) for one in offsets.items()]
                _insist(functools.partial(producer.send_offsets_to_transaction, after, consumer.consumer_group_metadata(), 30))
                _insist(functools.partial(producer.commit_transaction, 30))
                self.passed_on += len(found)
            except confluent_kafka.KafkaException as error:
                if error.args[0].fatal():
                    producer = self._producer()
                else:
                    _insist(functools.partial(producer.abort_transaction, PATIENCE))
                for where in consumer.committed(consumer.assignment(), PATIENCE):
                    where.offset = max(where.offset, 0)
                    consumer.seek(where)
        consumer.close()

    def read(self, topic: str) -> list[int]:
        """Read to the end as it is now."""
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": SERVERS, "group.id": "reader", "isolation.level": "read_committed", "enable.partition.eof": True}
        )
        consumer.assign([confluent_kafka.TopicPartition(topic, number, confluent_kafka.OFFSET_BEGINNING) for number in range(3)])
        found, ended, limit = [], set(), time.monotonic() + PATIENCE
        while len(ended) < 3:
            assert time.monotonic() < limit
            for message in consumer.consume(500, 0.5):
                if not message.error():
                    found.append(int(message.value()))
                elif message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
        consumer.close()
        return found


def _within(seconds: float, call: Callable[..., object], *arguments: object) -> None:
    """Call, and wait so long for the end; TimeoutError where it does not come."""
    ended: Future[object] = Future()

    def run() -> None:
        try:
            ended.set_result(call(*arguments))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    ended.result(seconds)


def _insist(call: Callable[[], object]) -> None:
    """Call again while the library says that it may be tried again."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            call()
            return
        except confluent_kafka.KafkaException as error:
            if not error.args[0].retriable() or time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def brokers(lab: Lab) -> Iterator[Supervisor]:
    """The three brokers: those of the lab that is up, or brokers alone for as long as it takes."""
    found = "broker-1" in lab.rows()
    if not found:
        lab.well("down", "--force")
        lab.well("up", "--no-cluster")
    yield Supervisor(STATE / "host")
    if not found:
        lab.well("down")


def all_in_sync(admin: AdminClient, topics: Sequence[str]) -> bool:
    """Whether every replica of these topics is in sync."""
    with contextlib.suppress(confluent_kafka.KafkaException):
        told = admin.list_topics(timeout=10).topics
        return all(len(one.isrs) == 3 for name in topics for one in told[name].partitions.values())
    return False


def known(topics: Sequence[str]) -> bool:
    """Whether each broker tells of every partition: a consumer that asks before gets none, and asks again after minutes."""
    for server in SERVERS.split(","):
        told = AdminClient({"bootstrap.servers": server}).list_topics(timeout=10).topics
        if not all(name in told and len(told[name].partitions) == 3 for name in topics):
            return False
    return True


@pytest.mark.parametrize("way", ["stopped in order", "killed"])
def test_a_restart_of_every_broker_in_turn(brokers: Supervisor, way: str) -> None:
    name = way.replace(" ", "-")
    clients: list[Client] = [KafkaPython(f"kafka-python-{name}"), Confluent(f"confluent-{name}")]
    topics = [topic for client in clients for topic in (client.source, client.target)]
    admin = AdminClient({"bootstrap.servers": SERVERS})
    for created in admin.create_topics([NewTopic(topic, 3, 3, config={"min.insync.replicas": "2"}) for topic in topics]).values():
        created.result(PATIENCE)
    until(lambda: known(topics), PATIENCE)
    for client in clients:
        client.begin()
    try:
        for broker in settings.BROKER_IDS:
            for client in clients:
                client.goes_on()
            if way == "killed":
                brokers.kill_program(f"broker-{broker}")
            else:
                brokers.rpc.supervisor.stopProcess(f"broker-{broker}")
            brokers.start_program(f"broker-{broker}")
            until(lambda: all_in_sync(admin, topics), PATIENCE)
        for client in clients:
            client.goes_on()
    finally:
        for client in clients:
            client.end()
    assert not [client.failed for client in clients if client.failed]
    for client in clients:
        written, passed_on = Counter(client.read(client.source)), Counter(client.read(client.target))
        assert not client.acknowledged - set(written), "acknowledged and lost"
        assert max(written.values()) == 1, "written twice"
        assert passed_on == written, "not passed on exactly once"
    for deleted in admin.delete_topics(topics).values():
        deleted.result(PATIENCE)
