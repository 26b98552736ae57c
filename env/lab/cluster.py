"""The embedded Kubernetes: a control-plane machine and worker machines, each component configured as its documentation says."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from lab import binaries, images, network, pki, settings
from lab.errors import Unhealthy
from lab.machine import Machine
from lab.report import Report
from lab.supervise import Program

CONTROL_PLANE = "control-plane"
MANIFESTS = settings.ENV / "cluster" / "manifests.yaml"
API_PORT = 6443
ENCRYPTION = "encryption.yaml"
BIN = "/opt/bin"


def node_names(count: int) -> list[str]:
    """The names of the worker nodes."""
    return [f"node-{number}" for number in range(1, count + 1)]


def machines(state: Path, subnet: str, nodes: list[str]) -> list[Machine]:
    """The control plane and the nodes, with their addresses."""
    found = [Machine(CONTROL_PLANE, network.address(subnet, 2), state / CONTROL_PLANE)]
    found += [Machine(name, network.address(subnet, 10 + number), state / name) for number, name in enumerate(nodes, 1)]
    return found


def pod_subnets(nodes: list[str]) -> dict[str, str]:
    """The Pod subnet of each node."""
    prefix = settings.POD_CIDR.rsplit(".", 2)[0]
    return {name: f"{prefix}.{number}.0/24" for number, name in enumerate(nodes, 1)}


def server(subnet: str) -> str:
    """The API server's URL."""
    return f"https://{network.address(subnet, 2)}:{API_PORT}"


def encryption(providers: list[dict]) -> dict:
    """The EncryptionConfiguration with which Secrets are stored by the first of `providers` and read by any."""
    return {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "EncryptionConfiguration",
        "resources": [{"resources": ["secrets"], "providers": providers}],
    }


def install(state: Path, subnet: str, nodes: list[str], owner: tuple[int, int], store: Path) -> None:
    """Make all certificates and write every component's configuration.

    Args:
        state: The lab's state folder.
        subnet: The bridge's subnet.
        nodes: The names of the worker nodes.
        owner: The user and group id that the kubeconfig belongs to.
        store: The containerd root that each node starts from.
    """
    control_plane, *workers = machines(state, subnet, nodes)
    ca, etcd_ca, front_proxy_ca = pki.Authority("kubernetes-ca"), pki.Authority("etcd-ca"), pki.Authority("kubernetes-front-proxy-ca")
    url = server(subnet)

    def kubeconfig(user: str, group: str = "") -> str:
        return pki.kubeconfig(url, ca, user, ca.issue(user, group))

    folder = control_plane.etc / "kubernetes"
    folder.joinpath("pki", "etcd").mkdir(parents=True, exist_ok=True)
    for name, authority in (("ca", ca), ("etcd/ca", etcd_ca), ("front-proxy-ca", front_proxy_ca)):
        folder.joinpath("pki", f"{name}.crt").write_bytes(authority.certificate)
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    ca.issue("kube-apiserver", server=(*names, network.address(settings.SERVICE_CIDR, 1), control_plane.address)).write(
        folder / "pki", "apiserver"
    )
    ca.issue("kube-apiserver-kubelet-client").write(folder / "pki", "apiserver-kubelet-client")
    etcd_ca.issue("kube-apiserver-etcd-client").write(folder / "pki", "apiserver-etcd-client")
    etcd_ca.issue("etcd", server=("localhost", "127.0.0.1", control_plane.address)).write(folder / "pki" / "etcd", "server")
    front_proxy_ca.issue("front-proxy-client").write(folder / "pki", "front-proxy-client")
    private, public = pki.service_account_key()
    pki.write_private(folder / "pki" / "sa.key", private)
    folder.joinpath("pki", "sa.pub").write_bytes(public)
    pki.write_private(folder / "controller-manager.conf", kubeconfig("system:kube-controller-manager"))
    pki.write_private(folder / "scheduler.conf", kubeconfig("system:kube-scheduler"))
    admin = ca.issue("admin", "system:masters")
    pki.write_private(state / "kubeconfig", pki.kubeconfig(url, ca, "admin", admin), owner)
    admin.write(state / "admin", "admin")
    (state / "admin" / "ca.crt").write_bytes(ca.certificate)
    reader = etcd_ca.issue("lesson")
    pki.write_private(state / "etcd.pem", reader.certificate + reader.key + etcd_ca.certificate, owner)
    pki.write_private(folder / ENCRYPTION, yaml.safe_dump(encryption([{"identity": {}}])), owner)
    control_plane.install(_control_plane_programs(control_plane), owner)

    for worker in workers:
        folder = worker.etc / "kubernetes"
        folder.joinpath("pki").mkdir(parents=True, exist_ok=True)
        folder.joinpath("pki", "ca.crt").write_bytes(ca.certificate)
        ca.issue(f"system:node:{worker.name}", "system:nodes", server=(worker.name, worker.address), client=False).write(
            folder / "pki", "kubelet"
        )
        pki.write_private(folder / "kubelet.conf", kubeconfig(f"system:node:{worker.name}", "system:nodes"))
        pki.write_private(folder / "kube-proxy.conf", kubeconfig("system:kube-proxy"))
        _write(folder / "kubelet.yaml", yaml.safe_dump(_kubelet(worker)))
        _write(folder / "kube-proxy.yaml", yaml.safe_dump(_kube_proxy(worker)))
        _write(worker.etc / "cni" / "net.d" / "10-lab.conflist", json.dumps(_cni(pod_subnets(nodes)[worker.name]), indent=2))
        plant(store, worker.folder / "var" / "lib" / "containerd")
        _write(worker.etc / "containerd" / "config.toml", CONTAINERD)
        _write(worker.etc / "nftables.conf", MASQUERADE)
        worker.install(_node_programs(worker), owner)
    for folder in (state / "admin", *state.glob("*/etc/kubernetes/pki"), *state.glob("*/etc/kubernetes/pki/etcd")):
        folder.chmod(0o700)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _flags(program: str, **flags: str) -> tuple[str, ...]:
    return (f"{BIN}/{program}", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()))


def _control_plane_programs(machine: Machine) -> list[Program]:
    pki_folder = "/etc/kubernetes/pki"
    etcd = _flags(
        "etcd",
        name=machine.name,
        data_dir="/var/lib/etcd",
        log_level="warn",
        unsafe_no_fsync="true",
        listen_client_urls=f"https://127.0.0.1:2379,https://{machine.address}:2379",
        advertise_client_urls=f"https://{machine.address}:2379",
        listen_peer_urls="http://127.0.0.1:2380",
        initial_advertise_peer_urls="http://127.0.0.1:2380",
        initial_cluster=f"{machine.name}=http://127.0.0.1:2380",
        client_cert_auth="true",
        trusted_ca_file=f"{pki_folder}/etcd/ca.crt",
        cert_file=f"{pki_folder}/etcd/server.crt",
        key_file=f"{pki_folder}/etcd/server.key",
    )
    apiserver = _flags(
        "kube-apiserver",
        advertise_address=machine.address,
        bind_address=machine.address,
        secure_port=str(API_PORT),
        allow_privileged="true",
        authorization_mode="Node,RBAC",
        enable_admission_plugins="NodeRestriction",
        anonymous_auth="false",
        profiling="false",
        client_ca_file=f"{pki_folder}/ca.crt",
        tls_cert_file=f"{pki_folder}/apiserver.crt",
        tls_private_key_file=f"{pki_folder}/apiserver.key",
        encryption_provider_config=f"/etc/kubernetes/{ENCRYPTION}",
        etcd_servers="https://127.0.0.1:2379",
        etcd_cafile=f"{pki_folder}/etcd/ca.crt",
        etcd_certfile=f"{pki_folder}/apiserver-etcd-client.crt",
        etcd_keyfile=f"{pki_folder}/apiserver-etcd-client.key",
        kubelet_certificate_authority=f"{pki_folder}/ca.crt",
        kubelet_client_certificate=f"{pki_folder}/apiserver-kubelet-client.crt",
        kubelet_client_key=f"{pki_folder}/apiserver-kubelet-client.key",
        kubelet_preferred_address_types="InternalIP",
        requestheader_client_ca_file=f"{pki_folder}/front-proxy-ca.crt",
        requestheader_allowed_names="front-proxy-client",
        requestheader_extra_headers_prefix="X-Remote-Extra-",
        requestheader_group_headers="X-Remote-Group",
        requestheader_username_headers="X-Remote-User",
        proxy_client_cert_file=f"{pki_folder}/front-proxy-client.crt",
        proxy_client_key_file=f"{pki_folder}/front-proxy-client.key",
        enable_aggregator_routing="true",
        service_cluster_ip_range=settings.SERVICE_CIDR,
        service_account_issuer="https://kubernetes.default.svc.cluster.local",
        service_account_key_file=f"{pki_folder}/sa.pub",
        service_account_signing_key_file=f"{pki_folder}/sa.key",
    )
    controller_manager = _flags(
        "kube-controller-manager",
        kubeconfig="/etc/kubernetes/controller-manager.conf",
        bind_address="127.0.0.1",
        leader_elect="false",
        profiling="false",
        use_service_account_credentials="true",
        service_account_private_key_file=f"{pki_folder}/sa.key",
        root_ca_file=f"{pki_folder}/ca.crt",
        cluster_cidr=settings.POD_CIDR,
        allocate_node_cidrs="false",
        kube_api_qps="200",
        kube_api_burst="400",
        flex_volume_plugin_dir="/var/lib/flexvolume",
    )
    scheduler = _flags(
        "kube-scheduler", kubeconfig="/etc/kubernetes/scheduler.conf", bind_address="127.0.0.1", leader_elect="false", profiling="false"
    )
    return [
        Program("etcd", etcd, priority=1),
        Program("kube-apiserver", apiserver, priority=2),
        Program("kube-controller-manager", controller_manager, priority=3),
        Program("kube-scheduler", scheduler, priority=3),
    ]


def _node_programs(machine: Machine) -> list[Program]:
    return [
        Program("containerd", _flags("containerd", config="/etc/containerd/config.toml"), priority=1),
        Program(
            "kubelet",
            _flags(
                "kubelet",
                kubeconfig="/etc/kubernetes/kubelet.conf",
                config="/etc/kubernetes/kubelet.yaml",
                hostname_override=machine.name,
                node_ip=machine.address,
            ),
            priority=2,
        ),
        Program("kube-proxy", _flags("kube-proxy", config="/etc/kubernetes/kube-proxy.yaml"), priority=3),
    ]


def _kubelet(machine: Machine) -> dict:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": machine.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": "/etc/kubernetes/pki/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/pki/kubelet.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/pki/kubelet.key",
        "healthzBindAddress": "127.0.0.1",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{settings.FULL_NAME}/{machine.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": ["pods"],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [settings.DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "podLogsDir": "/var/log/pods",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        # A crash loop is seen whole in a minute: 1, 2, 4 … 16 s in place of 10, 20, 40 … 300 s (KEP-4603).
        "featureGates": {"KubeletCrashLoopBackOffMax": True, "ReduceDefaultCrashLoopBackOffDecay": True},
        "crashLoopBackOff": {"maxContainerRestartPeriod": "16s"},
    }


def _kube_proxy(machine: Machine) -> dict:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": "/etc/kubernetes/kube-proxy.conf"},
        "hostnameOverride": machine.name,
        "mode": "nftables",
        "clusterCIDR": settings.POD_CIDR,
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    }


def _cni(subnet: str) -> dict:
    ranges = [[{"subnet": subnet}]]
    return {
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": True}},
        ],
    }


CONTAINERD_PLUGINS = """disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs", "io.containerd.nri.v1.nri",
]
"""

CONTAINERD = f"""version = 3
{CONTAINERD_PLUGINS}
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{images.PAUSE}"

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{BIN}"]
  conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  SystemdCgroup = false
"""

MASQUERADE = f"""# What leaves the Pods' network leaves as the node, as on any cluster whose Pod addresses are its own.
table ip lab {{
  chain postrouting {{
    type nat hook postrouting priority srcnat + 10;
    ip saddr {settings.POD_CIDR} ip daddr != {settings.POD_CIDR} masquerade
  }}
}}
"""


def image_store(report: Report, more: Iterable[Path] = ()) -> Path:
    """A containerd root that holds the cluster's and the lessons' images, unpacked once and kept in the cache.

    Every node starts from it: unpacking takes two seconds of processor time per node, linking takes none.

    Args:
        report: Where the step is told.
        more: Archives of further images.

    Raises:
        Unhealthy: containerd refused an image.
    """
    archives = [images.system_archive(report), images.demo_archive(report), *more]
    target = settings.cache() / f"store-{binaries.key_of(archive.name.encode() for archive in archives)}"
    if target.is_dir():
        return target
    with report.alone(settings.cache() / "store.lock"), report.step("Unpack the images"):
        draft = target.with_name("store.new")
        shutil.rmtree(draft, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
            configuration = Path(scratch, "config.toml")
            configuration.write_text(
                f'version = 3\nroot = "{draft}"\nstate = "{scratch}/state"\n[grpc]\n  address = "{scratch}/sock"\n{CONTAINERD_PLUGINS}'
            )
            script = (
                'containerd --config "$1/config.toml" >"$1/log" 2>&1 & n=0; '
                'until ctr --address "$1/sock" version >/dev/null 2>&1; do n=$((n+1)); [ $n -gt 300 ] && { tail -n 3 "$1/log" >&2; exit 1; }; sleep 0.1; done; '
                'folder=$1; shift; for archive in "$@"; do ctr --address "$folder/sock" --namespace k8s.io images import "$archive" >/dev/null || exit 1; done; '
                "kill $!; wait $!; exit 0"
            )
            command = [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child=KILL",
                "/bin/sh",
                "-c",
                script,
                "sh",
                scratch,
                *map(str, archives),
            ]
            environment = {**os.environ, "PATH": f"{binaries.CLUSTER.folder}:{os.environ['PATH']}"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Unhealthy(
                f"containerd did not take the images: {done.stderr.strip()[-300:]}",
                "Run `lab up` again; if it stays so, `lab down --purge` first.",
            )
        for old in settings.cache().glob("store-*"):
            shutil.rmtree(old, ignore_errors=True)
        draft.replace(target)
    return target


def plant(store: Path, root: Path) -> None:
    """Give a node's containerd the images of `store`: linked where the file systems allow it, else copied."""

    def link(source: str, destination: str) -> str:
        if not source.endswith(".db"):
            try:
                os.link(source, destination, follow_symlinks=False)
                return destination
            except OSError:
                pass
        return shutil.copy2(source, destination, follow_symlinks=False)

    shutil.copytree(store, root, symlinks=True, copy_function=link, dirs_exist_ok=True)


def kubectl(kubeconfig: str | Path, *arguments: str, stdin: str | None = None, timeout: float = 30) -> subprocess.CompletedProcess:
    """Run kubectl and capture what it says."""
    return subprocess.run(
        [str(binaries.CLUSTER.folder / "kubectl"), f"--kubeconfig={kubeconfig}", *arguments],
        env={**os.environ, "KUBECACHEDIR": str(Path(kubeconfig).parent / "kubectl-cache"), "KUBECTL_KUBERC": "false"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Api:
    """The API server as `lab up` asks it, many times a second: one connection, no kubectl to start each time.

    Args:
        state: The lab's state folder.
        subnet: The bridge's subnet.
    """

    def __init__(self, state: Path, subnet: str) -> None:
        folder = state / "admin"
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "admin.crt", folder / "admin.key")
        self._connection = http.client.HTTPSConnection(network.address(subnet, 2), API_PORT, timeout=5, context=context)

    def get(self, path: str) -> bytes | None:
        """What a path answers with status 200, else None."""
        try:
            self._connection.request("GET", path)
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return None
        return body if response.status == 200 else None

    def ready(self) -> bool:
        """Whether the API server is ready."""
        return self.get("/readyz") is not None

    def nodes_ready(self, count: int) -> bool:
        """Whether `count` nodes are Ready."""
        listed = json.loads(self.get("/api/v1/nodes") or b'{"items": []}')["items"]
        conditions = [one for node in listed for one in node["status"].get("conditions", []) if one["type"] == "Ready"]
        return sum(one["status"] == "True" for one in conditions) == count

    def dns_ready(self) -> bool:
        """Whether a Pod of CoreDNS is Ready."""
        found = json.loads(self.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns") or b"{}")
        return bool(found.get("status", {}).get("availableReplicas"))


def apply_manifests(run: Callable[..., subprocess.CompletedProcess]) -> None:
    """Apply the cluster's own manifests: CoreDNS, and the API server's right to talk to kubelets.

    Args:
        run: `kubectl` bound to the cluster.

    Raises:
        Unhealthy: The API server refused one.
    """
    text = MANIFESTS.read_text().replace("$COREDNS", images.COREDNS).replace("$DNS_ADDRESS", settings.DNS_ADDRESS)
    done = run("apply", "--server-side", "--force-conflicts", "--validate=false", "-f", "-", stdin=text)
    if done.returncode:
        raise Unhealthy(f"The cluster did not take its own manifests: {done.stderr.strip()[-300:]}.", "See `lab logs kube-apiserver`.")
