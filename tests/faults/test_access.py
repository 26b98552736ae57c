"""Nobody is let in: who listens where, what each door says to strangers, who may read which file."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from lab import cluster, lifecycle, pki

from ..conftest import LINK, PORT, STATE, Lab
from ..conftest import until as wait_until

until = functools.partial(wait_until, limit=120)
CHECKOUT = Path(__file__).parents[2]
HERE, BESIDE = "198.51.100.1", "198.51.100.2"
"""Of a network beside the lab: the host, and a stranger. From the range for documentation (RFC 5737), so that nobody is there."""
CLIENT = "localhost/by-experiment/client:v1"


@pytest.fixture(scope="module")
def shut(lab: Lab) -> Iterator[Lab]:
    """A fresh lab with the gateway, a Pod to try doors from, and a network beside it from which others might come."""
    lab.well("down", "--force")
    lab.well("up")
    lab.well("addon", "loadbalancer", "gateway")
    lab.kubectl("create", "namespace", "stranger")
    lab.kubectl("-n=stranger", "create", "secret", "generic", "door", "--from-literal=word=open-sesame")
    lab.kubectl("-n=stranger", "run", "stranger", f"--image={CLIENT}", "--command", "--", "python3", "-c", "import signal; signal.pause()")
    lab.kubectl("-n=stranger", "wait", "pod/stranger", "--for=condition=Ready", "--timeout=120s")
    ip("netns", "add", "stranger")
    try:
        ip("link", "add", "stranger", "type", "veth", "peer", "name", "eth0", "netns", "stranger")
        ip("addr", "add", f"{HERE}/30", "dev", "stranger")
        ip("link", "set", "stranger", "up")
        ip("-n", "stranger", "addr", "add", f"{BESIDE}/30", "dev", "eth0")
        ip("-n", "stranger", "link", "set", "eth0", "up")
        ip("-n", "stranger", "route", "add", "default", "via", HERE)
        yield lab
    finally:
        ip("netns", "delete", "stranger")
        ip("link", "delete", "stranger", may_fail=True)


def ip(*arguments: str, may_fail: bool = False) -> None:
    subprocess.run(["ip", *arguments], check=not may_fail, capture_output=True)


def addresses() -> dict[str, str]:
    told = json.loads((STATE / "lab.json").read_text())
    return {one.name: one.address for one in cluster.machines(STATE, told["subnet"], told["nodes"])}


def bridge() -> str:
    return json.loads((STATE / "lab.json").read_text())["bootstrap_pods"].split(":")[0]


def kubectl(*arguments: str) -> str:
    done = cluster.kubectl(STATE / "kubeconfig", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listening(*where: str) -> set[tuple[str, str, int]]:
    """Program, address and port of each TCP and UDP socket that waits for others, in a network namespace."""
    said = subprocess.run([*where, "ss", "-Hltunp"], capture_output=True, text=True, check=True).stdout
    found = set()
    for line in said.splitlines():
        _, _, _, _, own, _, *users = line.split()
        address, _, port = own.rpartition(":")
        found |= {(name, address.strip("[]").removeprefix("::ffff:"), int(port)) for name in re.findall(r'\("([^"]+)"', " ".join(users))}
    return found


def test_only_what_must_listens_and_only_where_it_must(shut: Lab) -> None:
    own, local = addresses(), "127.0.0.1"
    assert listening("ip", "netns", "exec", f"{LINK}-control-plane") == {
        ("etcd", local, 2379),
        ("etcd", own["control-plane"], 2379),
        ("etcd", local, 2380),
        ("kube-apiserver", own["control-plane"], 6443),
        ("kube-controller", local, 10257),
        ("kube-scheduler", local, 10259),
    }
    # The Service of Envoy has externalTrafficPolicy: Local, for which a load balancer asks each node.
    asked = int(kubectl("-n=projectcontour", "get", "service", "envoy", "-o=jsonpath={.spec.healthCheckNodePort}"))
    for node in ("node-1", "node-2"):
        # containerd's door for `kubectl exec` has a port that the kernel chose; the kubelet alone comes there.
        assert {
            (name, address, 0 if name == "containerd" else port)
            for name, address, port in listening("ip", "netns", "exec", f"{LINK}-{node}")
        } == {
            ("containerd", local, 0),
            ("kube-proxy", local, 10249),
            ("kube-proxy", local, 10256),
            ("kube-proxy", own[node], asked),
            ("kubelet", local, 10248),
            ("kubelet", own[node], 10250),
        }
    assert listening("ip", "netns", "exec", f"{LINK}-switch") == set()
    pids = {process.pid for process in lifecycle.processes(STATE)}
    here = {
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for one in psutil.net_connections("inet")
        if one.pid in pids and not one.raddr
    }
    assert here == {(local, PORT + n + more) for n in range(3) for more in (0, 100)} | {(bridge(), PORT + n + 200) for n in range(3)}


def context(authority: str = "", certificate: str = "") -> ssl.SSLContext:
    trust = ssl.create_default_context(cafile=authority or str(STATE / "admin" / "ca.crt"))
    trust.check_hostname = False
    if certificate:
        trust.load_cert_chain(certificate)
    return trust


def ask(address: str, port: int, path: str, trust: ssl.SSLContext | None = None, token: str = "", method: str = "GET") -> int | str:
    """The status that an HTTPS door answers with, or "refused" where it does not get so far."""
    connection = http.client.HTTPSConnection(address, port, timeout=10, context=trust or context())
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    except (ssl.SSLError, ConnectionError):
        return "refused"
    finally:
        connection.close()


@pytest.fixture
def forged(tmp_path: Path) -> str:
    """The certificate, with its key, of an administrator by an authority of the cluster's name that is another."""
    issued = pki.Authority("kubernetes-ca").issue("admin", "system:masters")
    path = tmp_path / "forged.pem"
    path.write_bytes(issued.certificate + issued.key)
    return str(path)


def forged_token() -> str:
    """A service account's token as the cluster issues them, with another key's signature."""
    private, _ = pki.service_account_key()
    key = serialization.load_pem_private_key(private, None)

    def encoded(part: bytes) -> bytes:
        return base64.urlsafe_b64encode(part).rstrip(b"=")

    claims = {
        "iss": "https://kubernetes.default.svc.cluster.local",
        "aud": ["https://kubernetes.default.svc.cluster.local"],
        "sub": "system:serviceaccount:kube-system:default",
        "exp": 4102444800,
        "kubernetes.io": {"namespace": "kube-system", "serviceaccount": {"name": "default", "uid": "0"}},
    }
    signed = encoded(b'{"alg":"RS256"}') + b"." + encoded(json.dumps(claims).encode())
    return (signed + b"." + encoded(key.sign(signed, padding.PKCS1v15(), hashes.SHA256()))).decode()


@pytest.mark.parametrize("path", ["/api/v1/secrets", "/api", "/version", "/healthz", "/metrics", "/openapi/v3", "/logs/", "/debug/pprof/"])
def test_the_api_server_knows_no_strangers(shut: Lab, forged: str, path: str) -> None:
    address = addresses()["control-plane"]
    with_forged = context(certificate=forged)
    assert ask(address, 6443, path) == 401
    assert ask(address, 6443, path, token="nonsense") == 401
    assert ask(address, 6443, path, token=forged_token()) == 401
    assert ask(address, 6443, path, with_forged) in (401, "refused")
    own = context()
    own.load_cert_chain(STATE / "admin" / "admin.crt", STATE / "admin" / "admin.key")
    assert ask(address, 6443, path, own) in ((403, 404) if path in ("/logs/", "/debug/pprof/") else (200,))


@pytest.mark.parametrize("path", ["/pods", "/metrics", "/healthz", "/configz", "/logs/", "/run/default/stranger/stranger", "/debug/pprof/"])
def test_the_kubelet_knows_no_strangers(shut: Lab, forged: str, path: str) -> None:
    address = addresses()["node-1"]
    assert ask(address, 10250, path) == 401
    assert ask(address, 10250, path, token=forged_token()) == 401
    assert ask(address, 10250, path, context(certificate=forged)) in (401, "refused")
    assert ask(address, 10250, path, token=token()) == 403
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 10255), timeout=5)


def test_etcd_knows_no_strangers(shut: Lab, forged: str, tmp_path: Path) -> None:
    address = addresses()["control-plane"]
    authority = str(STATE / "etcd.pem")
    admin = tmp_path / "admin.pem"
    admin.touch(0o600)
    admin.write_bytes(b"".join((STATE / "admin" / f"admin.{kind}").read_bytes() for kind in ("crt", "key")))
    for certificate in ("", forged, str(admin)):
        for path in ("/version", "/health", "/metrics", "/v3/kv/range"):
            assert ask(address, 2379, path, context(authority, certificate), method="POST" if "kv" in path else "GET") == "refused"
    assert ask(address, 2379, "/version", context(authority, authority)) == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 2380), timeout=5)


def test_the_controller_manager_and_the_scheduler_are_for_their_machine_alone(shut: Lab) -> None:
    address = addresses()["control-plane"]
    for port in (10257, 10259):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)
        command = ["ip", "netns", "exec", f"{LINK}-control-plane", "curl", "-sk", "-m10", "-o/dev/null", "-w%{http_code}"]
        said = subprocess.run([*command, f"https://127.0.0.1:{port}/metrics"], capture_output=True, text=True).stdout
        assert said in ("401", "403")


TRY = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def opens(door):
    host, _, port = door.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
        return True
    except OSError:
        return False
with ThreadPoolExecutor(32) as pool:
    for door, found in zip(sys.argv[1:], pool.map(opens, sys.argv[1:])):
        if found:
            print(door)
"""
"""Prints which of the doors open."""


def from_a_pod(*doors: str) -> set[str]:
    return set(kubectl("-n=stranger", "exec", "stranger", "--", "python3", "-c", TRY, *doors).split())


def from_beside(*doors: str) -> set[str]:
    command = ["ip", "netns", "exec", "stranger", sys.executable, "-c", TRY, *doors]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_brokers_are_reached_from_the_host_and_from_pods_alone(shut: Lab) -> None:
    for_pods = [f"{bridge()}:{PORT + number + 200}" for number in range(3)]
    shut_to_pods = [f"{bridge()}:{PORT + number + more}" for number in range(3) for more in (0, 100)]
    assert from_a_pod(*for_pods, *shut_to_pods) == set(for_pods)
    with socket.create_server((HERE, 0)) as control:
        open_door = f"{HERE}:{control.getsockname()[1]}"
        doors = [f"{host}:{PORT + number + more}" for host in (HERE, bridge()) for number in range(3) for more in (0, 100, 200)]
        assert from_beside(open_door, *doors) == {open_door}


def test_nothing_of_the_cluster_is_reached_from_beside(shut: Lab) -> None:
    own = addresses()
    forwards = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwards.read_text()
    forwards.write_text("1")  # As Docker, or a router, has it.
    try:
        doors = [f"{own['control-plane']}:6443", f"{own['control-plane']}:2379", f"{own['node-1']}:10250", f"{front()}:80"]
        with socket.create_server((HERE, 0)) as control:
            open_door = f"{HERE}:{control.getsockname()[1]}"
            assert from_beside(open_door, *doors) == {open_door}
    finally:
        forwards.write_text(before)


def front() -> str:
    query = "-o=jsonpath={.status.loadBalancer.ingress[0].ip}"
    return str(until(lambda: kubectl("-n=projectcontour", "get", "service", "envoy", query).strip()))


def test_nobody_administers_envoy_or_contour(shut: Lab) -> None:
    pods = json.loads(kubectl("-n=projectcontour", "get", "pods", "-o=json"))["items"]
    by_app = {pod["metadata"]["labels"].get("app", ""): pod["status"]["podIP"] for pod in pods}
    admin = [f"{by_app['envoy']}:{port}" for port in (9001, 9901, 19000)] + [f"{by_app['contour']}:6060"]
    metrics = f"{by_app['envoy']}:8002"
    assert from_a_pod(metrics, *admin) == {metrics}
    assert from_beside(metrics, *admin) == set()
    program = f"""
import http.client
for path in ("/ready", "/config_dump", "/quitquitquit", "/certs", "/clusters"):
    connection = http.client.HTTPConnection("{metrics}", timeout=5)
    connection.request("POST" if "quit" in path else "GET", path)
    print(connection.getresponse().status)
"""
    assert kubectl("-n=stranger", "exec", "stranger", "--", "python3", "-c", program).split() == ["200", *["404"] * 4]


def token() -> str:
    return kubectl("-n=stranger", "create", "token", "default", "--duration=10m").strip()


@pytest.mark.parametrize(
    "path",
    ["/api/v1/secrets", "/api/v1/namespaces/stranger/secrets", "/api/v1/namespaces/stranger/secrets/door", "/api/v1/namespaces/kube-system/secrets",
     "/api/v1/namespaces/stranger/configmaps", "/api/v1/nodes", "/api/v1/pods", "/apis/rbac.authorization.k8s.io/v1/clusterroles"],
)  # fmt: skip
def test_a_fresh_service_account_may_read_nothing(shut: Lab, path: str) -> None:
    address = addresses()["control-plane"]
    assert ask(address, 6443, "/api", token=token()) == 200
    assert ask(address, 6443, path, token=token()) == 403


def test_a_nodes_certificate_reads_no_secret_of_other_nodes_pods(shut: Lab) -> None:
    def may(verb: str, what: str, *more: str) -> str:
        user = ("--as=system:node:node-1", "--as-group=system:nodes")
        return cluster.kubectl(STATE / "kubeconfig", "auth", "can-i", verb, what, *user, *more).stdout.split()[0]

    assert may("get", "secrets/door", "-n=stranger") == "no"
    assert may("list", "secrets", "-A") == "no"


SECRET = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64}|client-key-data: *[A-Za-z0-9+/]{64}|\bsecret: *[A-Za-z0-9+/]{43}="
)
TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]{16,}\.eyJ[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{32,}")


def files(*tops: Path, largest: int = 4 << 20) -> Iterator[Path]:
    """Every file below, but the images that anybody may have."""
    for top in tops:
        for path in top.rglob("*"):
            if "containerd" not in path.parts and path.is_file() and not path.is_symlink() and path.stat().st_size < largest:
                yield path


def test_secrets_are_their_owners_alone(shut: Lab) -> None:
    holding = {path for path in files(STATE) if SECRET.search(content := path.read_bytes()) or TOKEN.search(content)}
    secret = {path for path in holding if "etcd" not in path.parts[-5:] or path.suffix == ".key"}
    names = {path.name for path in secret}
    assert {"kubeconfig", "etcd.pem", "admin.key", "sa.key", "kubelet.conf", "kube-proxy.conf", "scheduler.conf", "kubelet.key"} <= names
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in holding if stat.S_IMODE(path.stat().st_mode) != 0o600} == {}
    assert {path.stat().st_uid for path in holding} == {0}
    folders = {path.parent for path in secret if path.suffix == ".key"}
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in folders if stat.S_IMODE(path.stat().st_mode) != 0o700} == {}
    encryption = STATE / "control-plane" / "etc" / "kubernetes" / "encryption.yaml"
    assert stat.S_IMODE(encryption.stat().st_mode) == 0o600


def test_another_user_of_this_machine_reads_no_secret(shut: Lab) -> None:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "find", str(STATE), "-type", "f", "-readable", "-print0"]
    readable = [Path(name) for name in subprocess.run(command, capture_output=True, text=True).stdout.split("\0") if name]
    assert STATE / "lab.json" in readable
    assert [path for path in readable if SECRET.search(content := path.read_bytes()) or TOKEN.search(content)] == []
    assert [path for path in readable if path.is_relative_to(STATE / "control-plane" / "var" / "lib")] == []
    assert [path for path in readable if path.suffix == ".log" and path.parent.name.isdigit()] == []
    assert [path for path in readable if "data" in path.parts and "broker-1" in path.parts] == [], "messages are for those who consume them"
    try_socket = "import socket; socket.socket(socket.AF_UNIX).connect('{}')"
    for path in [STATE / "host", *(STATE / name / "var" / "supervisor" for name in ("control-plane", "node-1"))]:
        told = subprocess.run(
            [*command[:4], "/usr/bin/python3", "-c", try_socket.format(path / "control.sock")], capture_output=True, text=True
        )
        assert "PermissionError" in told.stderr


def keys() -> set[bytes]:
    """What the lab's keys look like wherever they are written: a line of each as PEM has it, and of its kubeconfigs."""
    found = set()
    for path in files(STATE):
        if path.suffix == ".key" or path.name == "etcd.pem":
            for block in re.findall(rb"PRIVATE KEY-----\n(.+?)-----END", path.read_bytes(), re.DOTALL):
                found.add(max(block.split(b"\n")[1:], key=len))  # The first line is much the same in all.
        for encoded in re.findall(
            rb"client-key-data: *(\S+)", path.read_bytes() if path.suffix == ".conf" or path.name == "kubeconfig" else b""
        ):
            found |= {encoded[80:160], base64.b64decode(encoded).split(b"\n")[2]}
    assert len(found) > 10
    assert all(len(one) > 20 for one in found)
    return found


def test_no_secret_is_logged_or_named_on_a_command_line(shut: Lab) -> None:
    secrets = keys()
    logs = [path for path in files(STATE, largest=1 << 30) if path.suffix == ".log"]
    assert len(logs) > 10
    told = {str(path): path.read_bytes() for path in logs}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = "\0".join(process.cmdline())
            if STATE.name in arguments or arguments.startswith("/opt/bin/"):
                told[arguments] = arguments.encode()
    tokens = {token().encode()}
    assert TOKEN.search(next(iter(tokens)))
    for where, content in told.items():
        assert not [one for one in secrets if one in content], where
        assert not SECRET.search(content), where
        assert not TOKEN.search(content), where


def test_no_secret_is_in_the_book() -> None:
    book = [path for top in ("notebooks", "book", "_build/html") for path in (CHECKOUT / top).rglob("*")]
    book = [path for path in book if path.suffix in (".ipynb", ".md", ".html", ".json", ".js", ".txt") and path.is_file()]
    assert len(book) > 20
    own = keys() if STATE.exists() else set()
    found = []
    for path in book:
        content = path.read_bytes()
        escaped = content.replace(b"\\n", b"\n")
        found += [str(path) for pattern in (SECRET, TOKEN) if pattern.search(escaped)] + [str(path) for one in own if one in escaped]
    assert found == []


@pytest.mark.slow
def test_each_lab_has_keys_of_its_own(shut: Lab) -> None:
    before, authority = keys(), (STATE / "admin" / "ca.crt").read_bytes()
    shut.well("down")
    shut.well("up")
    assert not before & keys()
    assert (STATE / "admin" / "ca.crt").read_bytes() != authority
