"""What add-ons bring, each on the lab of these tests."""

from __future__ import annotations

import base64
import functools
import json
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml

from ..conftest import STATE, Lab
from ..conftest import until as wait_until

PATIENCE = 90
until = functools.partial(wait_until, limit=PATIENCE, every=0.3)
IMAGE = "localhost/by-experiment/shop:v1"
ADDONS = ("storage", "metrics", "gateway", "loadbalancer", "helm")


@pytest.fixture(scope="module")
def addons(lab: Lab) -> Iterator[Lab]:
    """The lab with every add-on, and a shop with a volume behind each kind of entrance."""
    lab.well("up", "--no-brokers")
    lab.well("addon", *ADDONS)
    apply(
        lab,
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "orders", "namespace": "shop"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "shop", "namespace": "shop"},
            "spec": {
                "selector": {"matchLabels": {"app": "shop"}},
                "template": {
                    "metadata": {"labels": {"app": "shop"}},
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{"name": "shop", "image": IMAGE, "volumeMounts": [{"name": "orders", "mountPath": "/orders"}]}],
                        "volumes": [{"name": "orders", "persistentVolumeClaim": {"claimName": "orders"}}],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "shop", "namespace": "shop"},
            "spec": {"type": "LoadBalancer", "selector": {"app": "shop"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": "shop", "namespace": "shop"},
            "spec": {
                "rules": [
                    {
                        "host": "ingress.shop.test",
                        "http": {
                            "paths": [{"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "shop", "port": {"number": 80}}}}]
                        },
                    }
                ]
            },
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "shop", "namespace": "shop"},
            "spec": {
                "parentRefs": [{"name": "contour", "namespace": "projectcontour"}],
                "hostnames": ["gateway.shop.test"],
                "rules": [{"backendRefs": [{"name": "shop", "port": 80}]}],
            },
        },
    )
    lab.kubectl("-n=shop", "rollout", "status", "deployment/shop", f"--timeout={PATIENCE}s")
    yield lab
    lab.kubectl("delete", "namespace", "shop", "--wait=false")


def apply(lab: Lab, *objects: dict) -> None:
    path = STATE / "test.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    lab.kubectl("apply", "-f", str(path))


def address(lab: Lab, namespace: str, service: str) -> str:
    return str(until(lambda: lab.kubectl("-n", namespace, "get", "service", service, "-o=jsonpath={.status.loadBalancer.ingress[0].ip}")))


def answer(url: str, host: str = "", context: ssl.SSLContext | None = None) -> dict:
    """What the shop answers from the host, or {} as long as it doesn't."""
    try:
        request = urllib.request.Request(url, headers={"Host": host} if host else {})
        return json.load(urllib.request.urlopen(request, timeout=5, context=context))
    except (urllib.error.URLError, OSError, ValueError):
        return {}


def in_pod(lab: Lab, program: str) -> str:
    return lab.kubectl("-n=shop", "exec", "deployment/shop", "--", "python3", "-c", program)


def test_a_second_time_costs_nothing(addons: Lab) -> None:
    assert "Bring up" not in addons.well("addon", *ADDONS)


def test_the_list_marks_what_runs(addons: Lab) -> None:
    running = [line.split()[1] for line in addons.well("addon").splitlines() if line.startswith("✓")]
    assert set(ADDONS) - {"helm"} <= set(running)


def test_an_unknown_name_is_one_line(addons: Lab) -> None:
    assert "There is no add-on 'nothing'" in addons.fails("addon", "nothing")


def test_a_load_balancers_address_answers_from_the_host_and_is_given_back(addons: Lab) -> None:
    own = address(addons, "shop", "shop")
    assert until(lambda: answer(f"http://{own}/"))["version"] == "v1"
    addons.kubectl("-n=shop", "patch", "service", "shop", "-p", '{"spec": {"type": "ClusterIP"}}')
    until(lambda: not addons.kubectl("-n=shop", "get", "service", "shop", "-o=jsonpath={.status.loadBalancer.ingress}"))
    addons.kubectl("-n=shop", "patch", "service", "shop", "-p", '{"spec": {"type": "LoadBalancer"}}')
    assert address(addons, "shop", "shop") == own


def test_ingress_and_gateway_route_by_host(addons: Lab) -> None:
    front = address(addons, "projectcontour", "envoy")
    for host in ("ingress.shop.test", "gateway.shop.test"):
        assert until(lambda host=host: answer(f"http://{front}/", host))["version"] == "v1"
    assert not answer(f"http://{front}/", "elsewhere.shop.test")


def test_the_gateways_certificate_is_the_labs_own(addons: Lab) -> None:
    front = address(addons, "projectcontour", "envoy")
    secret = json.loads(addons.kubectl("-n=projectcontour", "get", "secret", "lab-tls", "-o=json"))["data"]
    context = ssl.create_default_context(cadata=base64.b64decode(secret["ca.crt"]).decode())
    name = "gateway.shop.test"
    with socket.create_connection((front, 443), timeout=5) as plain, context.wrap_socket(plain, server_hostname=name) as secure:
        assert ("DNS", "*.shop.test") in secure.getpeercert()["subjectAltName"]


SERVER = """
import grpc, signal
from concurrent import futures
echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server = grpc.server(futures.ThreadPoolExecutor(2))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", {"Say": echo})])
server.add_insecure_port("0.0.0.0:50051")
server.start()
signal.sigwait({signal.SIGTERM})
"""


def test_the_gateway_routes_grpc(addons: Lab) -> None:
    metadata = {"name": "echo", "namespace": "shop"}
    container = {"name": "echo", "image": "localhost/by-experiment/grpc:v1", "args": ["-c", SERVER]}
    port = {"port": 50051, "appProtocol": "kubernetes.io/h2c"}
    route = {
        "parentRefs": [{"name": "contour", "namespace": "projectcontour"}],
        "hostnames": ["grpc.shop.test"],
        "rules": [{"matches": [{"method": {"service": "test.Echo", "method": "Say"}}], "backendRefs": [{"name": "echo", "port": 50051}]}],
    }
    apply(
        addons,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata | {"labels": {"app": "echo"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [container]},
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": {"app": "echo"}, "ports": [port]}},
        {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute", "metadata": metadata, "spec": route},
    )
    front = address(addons, "projectcontour", "envoy")
    with grpc.insecure_channel(f"{front}:80", options=[("grpc.default_authority", "grpc.shop.test")]) as channel:
        say = channel.unary_unary("/test.Echo/Say")

        def said() -> bytes | None:
            try:
                return say(b"hello", timeout=5)
            except grpc.RpcError:
                return None

        assert until(said) == b"hello"
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/test.Other/Say")(b"hello", timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_metrics_are_measured_and_verified(addons: Lab) -> None:
    service = json.loads(addons.kubectl("get", "apiservice", "v1beta1.metrics.k8s.io", "-o=json"))["spec"]
    assert service.get("caBundle")
    assert not service.get("insecureSkipTLSVerify")
    until(lambda: addons("kubectl", "top", "pods", "-n=kube-system").returncode == 0)
    assert "coredns" in addons.kubectl("top", "pods", "-n=kube-system")


def test_a_claim_outlives_its_pod_and_its_node(addons: Lab) -> None:
    in_pod(addons, "open('/orders/one', 'w').write('kept')")
    node = addons.kubectl("-n=shop", "get", "pods", "-l=app=shop", "-o=jsonpath={.items[0].spec.nodeName}")
    addons.kubectl("-n=shop", "delete", "pod", "-l=app=shop", "--now")
    addons.kubectl("-n=shop", "rollout", "status", "deployment/shop", f"--timeout={PATIENCE}s")
    assert in_pod(addons, "print(open('/orders/one').read())").strip() == "kept"
    addons.well("node", "restart", node)
    ran = "-o=jsonpath={.items[0].status.containerStatuses[0].restartCount}"
    until(lambda: addons.kubectl("-n=shop", "get", "pods", "-l=app=shop", ran) not in ("", "0"))
    until(lambda: addons("kubectl", "-n=shop", "exec", "deployment/shop", "--", "python3", "-c", "open('/orders/one')").returncode == 0)
    assert in_pod(addons, "print(open('/orders/one').read())").strip() == "kept"


LESSON = """
import os, subprocess, sys
import lab
topic = lab.start("test", cluster=True, addons=["helm"])
print(os.environ["REGISTRY"])
os.chdir(sys.argv[1])
def helm(*line):
    return subprocess.run(["helm", *line], capture_output=True, text=True, check=True).stdout
helm("create", "shop")
helm("package", "shop")
helm("push", "shop-0.1.0.tgz", f"oci://{topic.registry.address}/charts", "--plain-http")
print("version: 0.1.0" in helm("show", "chart", f"oci://{topic.registry.address}/charts/shop", "--plain-http"))
KILL
"""


@pytest.mark.parametrize("end", ["topic.clean_up()", "os.kill(os.getpid(), 9)"], ids=["cleaned up", "killed"])
def test_a_registry_lasts_as_long_as_its_lesson(addons: Lab, tmp_path: Path, end: str) -> None:
    environment = addons.environment | {f"HELM_{kind}_HOME": str(tmp_path / kind) for kind in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run(
        [sys.executable, "-u", "-c", LESSON.replace("KILL", end), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    _, registry, found, *_ = done.stdout.splitlines()
    assert found == "True", done.stderr
    until(lambda: not answer(f"http://{registry}/v2/") and not listens(registry))


def listens(registry: str) -> bool:
    host, _, port = registry.partition(":")
    return f" {host}:{port} " in subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout


def test_secrets_are_encrypted_at_rest_and_survive_a_lost_lesson(addons: Lab) -> None:
    program = """
import base64, os, sys
import lab
from kubernetes import client
topic = lab.start("test", cluster=True)
core, plane = client.CoreV1Api(), topic.control_plane
key = {"name": "one", "secret": base64.b64encode(os.urandom(32)).decode()}
told = {"apiVersion": "apiserver.config.k8s.io/v1", "kind": "EncryptionConfiguration",
        "resources": [{"resources": ["secrets"], "providers": [{"secretbox": {"keys": [key]}}, {"identity": {}}]}]}
plane.encrypt(told)
core.create_namespaced_secret(topic.namespace, {"metadata": {"name": "code"}, "stringData": {"door": "open sesame"}})
raw = plane.etcd(f"/registry/secrets/{topic.namespace}/code")
print(raw.startswith(b"k8s:enc:secretbox:v1:one:"), b"open sesame" in raw, topic.namespace)
"""
    namespaces = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], env=addons.environment, capture_output=True, text=True, timeout=2 * PATIENCE)
        assert done.returncode == 0, done.stderr
        encrypted, readable, namespace = done.stdout.splitlines()[-1].split()
        assert (encrypted, readable) == ("True", "False")
        namespaces.append(namespace)
    last = "import lab; topic = lab.start('other', cluster=True); topic.control_plane.encrypt(None); "
    last += f"print(b'open sesame' in topic.control_plane.etcd('/registry/secrets/{namespaces[-1]}/code')); topic.clean_up()"
    done = subprocess.run([sys.executable, "-c", last], env=addons.environment, capture_output=True, text=True, timeout=PATIENCE)
    assert "True" in done.stdout, done.stderr
    addons.kubectl("delete", "namespace", *namespaces, "--ignore-not-found", "--wait=false")


def test_a_cluster_brought_along_is_searched_for_the_like(addons: Lab) -> None:
    own = addons.environment | {"KUBECONFIG": str(STATE / "kubeconfig"), "LAB_CLUSTER": "context:lab"}
    own.pop("LAB_INSTANCE")
    command = [sys.executable, "-m", "lab", "addon", "storage", "metrics", "gateway"]
    assert subprocess.run(command, env=own, capture_output=True, text=True).returncode == 0
    addons.kubectl("annotate", "storageclass", "local-path", "storageclass.kubernetes.io/is-default-class-")
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    addons.kubectl("annotate", "storageclass", "local-path", "storageclass.kubernetes.io/is-default-class=true")
    assert done.returncode == 1
    assert done.stderr.startswith("lab: Your cluster does not offer a default StorageClass")
