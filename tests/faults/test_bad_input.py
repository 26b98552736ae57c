"""What a person can get wrong, or find broken: each is told in a line of cause and cure, without a traceback, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lab
from lab import settings
from lab.embedded import Brokers, ControlPlane, Nodes
from lab.errors import LabError
from lab.topic import Topic

from ..conftest import Lab, traces

INSTANCE = "8"
NOBODY = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
"""A person without root's rights, who owns what the tests own: file modes hold, and sudo is of no help."""
ALONE = ("unshare", "--user", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs tmpfs /var/lib && exec "$@"', "sh")
"""On a machine where root has no lab: it would be found before anything of the person's."""


class Person:
    """Somebody at a terminal, with a home and nothing in it.

    Args:
        home: Their home.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.cache = home, home / "cache"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("LAB_", "XDG_", "KUBE"))}
        self.environment |= {"HOME": str(home), "LAB_CACHE": str(self.cache), "XDG_STATE_HOME": str(home / "state")}
        self.environment |= {"LAB_INSTANCE": INSTANCE}
        self.state = home / "state" / f"{settings.NAME}{INSTANCE}"
        self.before: tuple[str, ...] = (*ALONE, *NOBODY)

    def offline(self) -> None:
        """Cut the network, loopback included: nothing may be fetched."""
        self.before = (*ALONE, "unshare", "--net", *NOBODY)

    def __call__(self, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[bytes]:
        """Run `lab`; a variable that is None is unset."""
        told = {name: value for name, value in (self.environment | environment).items() if value is not None}
        command = [*self.before, sys.executable, "-m", "lab", *arguments]
        return subprocess.run(command, env=told, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)

    def fails(self, says: str, *arguments: str, **environment: str | None) -> None:
        """Run `lab`: it must fail, say this in one or two lines on standard error, and show no traceback."""
        done = self(*arguments, **environment)
        error = done.stderr.decode()
        assert done.returncode != 0, done
        assert "Traceback" not in error, error
        assert says in error, error
        complaints = [line for line in error.splitlines() if line.strip() and line[0] not in "✓✗ "]
        assert 1 <= len(complaints) <= 2 or complaints[0].startswith("Usage:"), error

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file below the home."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def kubeconfig(self, server: str) -> str:
        """A kubeconfig with one context, `there`, of that server."""
        told = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "there",
            "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        return str(self.write("kubeconfig", json.dumps(told)))


@pytest.fixture
def person(tmp_path: Path) -> Person:
    """A person with an empty home, who may not be root."""
    if subprocess.run([*ALONE, *NOBODY, "true"], capture_output=True).returncode:
        pytest.skip("This kernel gives no user namespaces, in which a person could be alone.")
    return Person(tmp_path)


def closed() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


COMMANDS = [
    pytest.param(says, arguments, environment, id=" ".join([*(f"{name}={value}" for name, value in environment.items()), *arguments]))
    for says, arguments, environment in [
        ("No such command 'pu'", ["pu"], {}),
        ("No such option", ["up", "--node"], {}),
        ("99 is not in the range", ["up", "--nodes", "99"], {}),
        ("0 is not in the range", ["up", "--nodes", "0"], {}),
        ("is not a valid integer", ["up", "--nodes", "two"], {}),
        ("is not a valid integer", ["logs", "-n", "many"], {}),
        ("There is no log of 'nonsense'", ["logs", "nonsense"], {}),
        ("There is no log of '../../etc/passwd'", ["logs", "../../etc/passwd"], {}),
        ("There is no add-on 'nonsense'", ["addon", "nonsense"], {}),
        ("There is no add-on ''", ["addon", ""], {}),
        ("No lab with a cluster is up", ["addon", "storage"], {}),
        ("No lab is up", ["node", "restart", "node-9"], {}),
        ("Missing argument 'NAME'", ["node", "restart"], {}),
        ("No lab is up", ["kubectl", "get", "nodes"], {}),
        ("No lab is up", ["env"], {}),
        ("99 is not in the range", ["bench", "--runs", "99"], {}),
        ("LAB_INSTANCE='x' is not understood", ["status"], {"LAB_INSTANCE": "x"}),
        ("LAB_INSTANCE='10' is not understood", ["up"], {"LAB_INSTANCE": "10"}),
        ("LAB_CLUSTER='context:' is not understood", ["up"], {"LAB_CLUSTER": "context:"}),
        ("LAB_CLUSTER='lab' is not understood", ["env"], {"LAB_CLUSTER": "lab"}),
        ("'localhost' is not a bootstrap server", ["env"], {"LAB_BROKERS": "localhost"}),
        ("'a:99999' is not a bootstrap server", ["up"], {"LAB_BROKERS": "a:99999"}),
        ("'a:²' is not a bootstrap server", ["up"], {"LAB_BROKERS": "a:²"}),
        ("No kubeconfig can be read at /nowhere", ["up"], {"LAB_CLUSTER": "context:a", "KUBECONFIG": "/nowhere"}),
        ("/proc/nowhere", ["up", "--no-cluster"], {"LAB_CACHE": "/proc/nowhere"}),
        ("/proc/nowhere", ["build"], {"LAB_CACHE": "/proc/nowhere", "LAB_CLUSTER": "context:a"}),
        ("/dev/null", ["up", "--no-cluster"], {"XDG_STATE_HOME": "/dev/null"}),
        ("/dev/null", ["down"], {"XDG_STATE_HOME": "/dev/null"}),
    ]
]


@pytest.mark.parametrize(("says", "arguments", "environment"), COMMANDS)
def test_a_command_or_variable_that_is_wrong(person: Person, says: str, arguments: list[str], environment: dict[str, str]) -> None:
    person.offline()
    person.fails(says, *arguments, **environment)
    assert not person.state.exists()


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("cannot be read", "not: [yaml"),
        ("cannot be read", b"\xff\xfe\x00"),
        ("cannot be read", "a string"),
        ("cannot be read", ""),
        ("has no context 'there'", "{}"),
        ("has no context 'there'", "contexts: []"),
        ("cannot be read", "contexts: 7"),
        ("cannot be read", "contexts: [{name: there}]"),
        ("cannot be used", "contexts: [{name: there, context: {cluster: gone, user: gone}}]"),
    ],
)
def test_a_kubeconfig_that_is_none(person: Person, says: str, content: str | bytes) -> None:
    path = person.write("kubeconfig", content)
    person.fails(
        says.replace("cannot be read", f"No kubeconfig can be read at {path}"), "up", LAB_CLUSTER="context:there", KUBECONFIG=str(path)
    )


def test_a_kubeconfig_that_one_may_not_read(person: Person) -> None:
    path = person.write("kubeconfig", "{}")
    path.chmod(0)
    person.fails(f"No kubeconfig can be read at {path}", "env", LAB_CLUSTER="context:there", KUBECONFIG=str(path))


def test_a_cluster_that_refuses(person: Person) -> None:
    there = person.kubeconfig(f"http://127.0.0.1:{closed()}")
    person.fails("'there' does not answer", "up", LAB_CLUSTER="context:there", KUBECONFIG=there)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No lab anywhere, in this process."""
    monkeypatch.setattr(settings, "SYSTEM_STATE", tmp_path / "system")
    for name in ("LAB_CLUSTER", "LAB_BROKERS", "KUBECONFIG", "LAB_KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


TOPIC = Topic("peers", "peers-1", "peers-1-", [], [])
CALLS: dict[str, tuple[str, Callable[[], object]]] = {
    "start: capitals": ("cannot name a lesson", lambda: lab.start("Producer")),
    "start: empty": ("cannot name a lesson", lambda: lab.start("")),
    "start: a path": ("cannot name a lesson", lambda: lab.start("../etc")),
    "start: too long": ("cannot name a lesson", lambda: lab.start("a" * 41)),
    "start: no text": ("cannot name a lesson", lambda: lab.start(None)),
    "start: a newline": ("cannot name a lesson", lambda: lab.start("a\n")),
    "start: no lab": ("No lab is up", lambda: lab.start("a", brokers=True)),
    "start: unknown add-on": ("There is no add-on 'nonsense'", lambda: lab.start("a", brokers=True, addons=["nonsense"])),
    "start: an add-on that is no list": ("Write addons=['storage']", lambda: lab.start("a", cluster=True, addons="storage")),
    "wait: never": ("Waited 0 s for a wonder", lambda: lab.wait("a wonder", lambda: False, limit=0.01)),
    "wait: no function": ("is not a function", lambda: lab.wait("a wonder", True)),
    "check: does not hold": ("✗ one is two. Found instead: 3", lambda: lab.check("one is two", False, 3)),
    "check: a comparison of arrays": ("holds many values", lambda: lab.check("all are ready", lab.plots.pd.Series([True, False]))),
    "brokers.kill: none up": ("ends a broker", lambda: Brokers(embedded=True).kill(1)),
    "brokers.kill: somebody's own": ("ends a broker", lambda: Brokers(embedded=False).kill(1)),
    "nodes.kill: none up": ("cuts a node's power", lambda: Nodes(embedded=True).kill("node-9")),
    "nodes.restart: none up": ("cuts a node's power", lambda: Nodes(embedded=True).restart("node-9")),
    "etcd: none up": ("looks into etcd", lambda: ControlPlane(embedded=True).etcd("/registry")),
    "encrypt: somebody's own": ("changes how the API server", lambda: ControlPlane(embedded=False).encrypt(None)),
    "load: no cluster": ("was started without a cluster", lambda: Topic("a").load("http://shop/").__enter__()),
    "load: no address": ("is not an address", lambda: TOPIC.load("shop")),
    "load: a period of nothing": ("cannot have a period", lambda: TOPIC.load("http://shop/", period=0)),
    "load: an unknown way": ("is not understood", lambda: TOPIC.load("http://shop/", keep_alive="some")),
    "watch: no cluster": ("was started without a cluster", lambda: Topic("a").watch().__enter__()),
}


@pytest.mark.parametrize(("says", "call"), CALLS.values(), ids=CALLS)
def test_a_call_that_is_wrong(nowhere: Path, says: str, call: Callable[[], object]) -> None:
    with pytest.raises(LabError) as told:
        call()
    assert says in str(told.value)


@pytest.fixture
def other_cache(lab: Lab) -> Iterator[Path]:
    """A cache like the lab's, each file linked: what is to be changed must be replaced by a copy."""
    lab.well("down", "--force")
    before = settings.cache()
    with tempfile.TemporaryDirectory(prefix="lab-", dir=before.parent) as scratch:
        place = Path(scratch, "cache")
        place.mkdir()
        needed = [
            path for path in before.iterdir() if path.name.startswith(("cluster-", "images-", "kafka-4", "python-", "store-", "system-"))
        ]
        subprocess.run(["cp", "-al", *needed, place], check=True)
        yield place
        lab("down", "--force", LAB_CACHE=str(place))
    assert traces() == []


def replace(path: Path, content: bytes) -> None:
    """Give a file of the other cache another content; the lab's own keeps what it has."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o755)


def test_an_archive_of_images_that_broke_off(lab: Lab, other_cache: Path) -> None:
    (archive,) = other_cache.glob("images-*.tar")
    replace(archive, archive.read_bytes()[: 3 << 20])
    for store in other_cache.glob("store-*"):
        shutil.rmtree(store)
    assert "containerd did not take the images" in lab.fails("up", "--no-brokers", LAB_CACHE=str(other_cache))


@pytest.mark.slow
def test_a_jar_that_broke_off_is_fetched_again(lab: Lab, other_cache: Path) -> None:
    jar = next(other_cache.glob("kafka-*/jars/**/kafka-raft-*.jar"))
    whole = jar.read_bytes()
    replace(jar, whole[:100])
    lab.well("up", "--no-cluster", LAB_CACHE=str(other_cache))
    assert next(other_cache.glob("kafka-*/jars/**/kafka-raft-*.jar")).read_bytes() == whole


@pytest.mark.slow
def test_what_a_download_left_half_done_is_no_obstacle(lab: Lab, other_cache: Path) -> None:
    for name in ("kafka", "cluster", "images", "store"):
        draft = other_cache / f"{name}-0123456789ab.new"
        draft.mkdir()
        (draft / "half").write_bytes(b"PK")
    lab.well("up", LAB_CACHE=str(other_cache))


def test_a_program_of_another_processor_is_named(lab: Lab, other_cache: Path) -> None:
    (kubectl,) = other_cache.glob("cluster-*/kubectl")
    content = kubectl.read_bytes()
    replace(kubectl, content[:18] + b"\xf3\x00" + content[20:])  # e_machine: EM_RISCV
    said = lab.fails("up", "--no-brokers", LAB_CACHE=str(other_cache))
    assert str(kubectl) in said
    assert "Exec format error" in said
