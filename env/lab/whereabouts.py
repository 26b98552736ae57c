"""What runs where: the machines, what runs on each and at which address; collected from the lab, drawn as HTML.

The page "What runs where" shows it. A build that executes the notebooks asks the lab; one that does not takes the
snapshot that was written when the outputs were stored.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lab import addons, brokers, byo, cluster, network, settings, status

SNAPSHOT = settings.CHECKOUT / "book" / "what-runs-where.json"
MOST = 6
"""Of a cluster of your own, at most so many nodes are shown."""
LESSON = "by-experiment/topic"
"""The label of a lesson's namespace; what a lesson has left there is not shown."""


def collect() -> dict[str, Any]:
    """What runs now.

    Returns:
        The `date`; `own`, whether the cluster is one of your own; the `bridge`, if there is one; the `machines` with their
        `components` and `pods`; the `brokers`; the `services`. Memory is in bytes. Without a lab the lists are empty.

    Raises:
        LabError: A cluster of your own cannot be used.
    """
    own, lab = settings.own(), settings.find()
    told: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "own": bool(own.cluster)}
    told |= {"bridge": {}, "machines": [], "services": [], "brokers": []}
    rows = {row.name: row for row in status.collect()}
    if own.brokers:
        told["brokers"] = [{"name": "brokers of your own", "notebook": server} for server in own.brokers.split(",")]
    elif lab and lab.bootstrap:
        told["brokers"] = _brokers(lab, rows)
    if own.cluster:
        told["machines"] = _nodes_of_your_own(own.cluster)
    elif lab and lab.nodes:
        told |= _embedded(lab, rows)
    return told


def save() -> None:
    """Write what runs now as the snapshot that a build without a lab shows; nothing of a cluster or brokers of your own."""
    if settings.own() == settings.Own("", ""):
        SNAPSHOT.write_text(json.dumps(collect(), indent=1) + "\n")


def stored() -> dict[str, Any]:
    """The snapshot."""
    return json.loads(SNAPSHOT.read_text())


def _brokers(lab: settings.Lab, rows: dict[str, status.Row]) -> list[dict[str, Any]]:
    found = []
    for_pods = lab.bootstrap_pods.split(",") if lab.bootstrap_pods else [""] * len(settings.BROKER_IDS)
    for number, notebook, pods in zip(settings.BROKER_IDS, lab.bootstrap.split(","), for_pods, strict=True):
        host, _, port = notebook.partition(":")
        row = rows.get(f"broker-{number}")
        found.append(
            {
                "name": f"broker-{number}",
                "version": settings.KAFKA,
                "memory": row.memory if row else 0,
                "notebook": notebook,
                "controller": f"{host}:{int(port) + brokers.CONTROLLER}",
                "pods": pods,
            }
        )
    return found


def _embedded(lab: settings.Lab, rows: dict[str, status.Row]) -> dict[str, Any]:
    def get(*what: str) -> list[dict]:
        told = cluster.kubectl(lab.kubeconfig, "get", *what, "-o", "json")
        return [] if told.returncode else json.loads(told.stdout)["items"]

    lessons = {one["metadata"]["name"] for one in get("namespaces", f"--selector={LESSON}")}
    memory, subnets = status.pod_memory(lab), cluster.pod_subnets(lab.nodes)
    pods = [_pod(one, memory) for one in status.pods(lab) if one["metadata"]["namespace"] not in lessons]
    machines = []
    for machine in cluster.machines(Path(lab.state), lab.subnet, lab.nodes):
        inside = [row for name, row in rows.items() if name.startswith(f"{machine.name}/")]
        machines.append(
            {
                "name": machine.name,
                "address": machine.address,
                "namespace": network.namespace(machine.name),
                "components": [
                    {"name": row.name.partition("/")[2], "version": row.version, "memory": row.memory, "address": row.address}
                    for row in inside
                ],
                "subnet": subnets.get(machine.name, ""),
                "pods": sorted((pod for pod in pods if pod["node"] == machine.name), key=lambda pod: (pod["addon"], pod["workload"])),
            }
        )
    bridge = {
        "subnet": lab.subnet,
        "namespace": network.SWITCH,
        "link": network.HOST_LINK,
        "address": network.address(lab.subnet, 1),
        "services": network.service_addresses(lab.subnet),
    }
    services = [_service(one) for one in get("services", "--all-namespaces") if one["metadata"]["namespace"] not in lessons]
    return {"machines": machines, "bridge": bridge, "services": services}


def _pod(pod: dict, memory: dict[str, int]) -> dict[str, Any]:
    """What is shown of a Pod: the name of its workload, which is the same on every run."""
    owner = next(iter(pod["metadata"].get("ownerReferences", [])), {"kind": "Pod", "name": pod["metadata"]["name"]})
    suffix = "-" + pod["metadata"].get("labels", {}).get("pod-template-hash", "")
    replicated = owner["kind"] == "ReplicaSet" and owner["name"].endswith(suffix)
    return {
        "workload": owner["name"].removesuffix(suffix) if replicated else owner["name"],
        "kind": "Deployment" if replicated else owner["kind"],
        "namespace": pod["metadata"]["namespace"],
        "node": pod["spec"].get("nodeName", ""),
        "address": pod["status"].get("podIP", ""),
        "memory": memory.get(pod["metadata"]["uid"], 0),
        "addon": status.addon_of(pod),
    }


def _service(service: dict) -> dict[str, Any]:
    outside = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    return {
        "name": service["metadata"]["name"],
        "namespace": service["metadata"]["namespace"],
        "type": service["spec"]["type"],
        "address": service["spec"].get("clusterIP", ""),
        "outside": [one.get("ip") or one.get("hostname", "") for one in outside],
        "ports": sorted({port["port"] for port in service["spec"].get("ports", [])}),
    }


def _nodes_of_your_own(context: str) -> list[dict[str, Any]]:
    from kubernetes import client, config

    with config.new_client_from_config(str(byo.kubeconfig(context))) as api:
        nodes = client.CoreV1Api(api).list_node(_request_timeout=10).items
    found = []
    for node in nodes[:MOST]:
        info = node.status.node_info
        components = [
            {"name": "kubelet", "version": info.kubelet_version.lstrip("v"), "memory": 0, "address": ""},
            {"name": info.container_runtime_version.partition("://")[0], "version": info.container_runtime_version.partition("://")[2]},
        ]
        address = next((one.address for one in node.status.addresses or [] if one.type == "InternalIP"), "")
        found.append(
            {
                "name": node.metadata.name,
                "address": address,
                "namespace": "",
                "components": components,
                "subnet": node.spec.pod_cidr or "",
                "pods": [],
            }
        )
    return found


PICTURE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""
{% macro facts(one) %}
{% set known = [one.version, "%.0f MB" % (one.memory / 1e6) if one.memory] | select | join(" · ") %}
{% if known %}<span>{{ known }}</span>{% endif %}
{% endmacro %}
{% macro cluster() %}
<ul class="where-row">
{% for machine in machines %}
<li class="where-machine">
<p><b>{{ machine.name }}</b> <code>{{ machine.address }}</code></p>
<ul class="where-parts">
{% for one in machine.components %}<li><b>{{ one.name }}</b>{{ facts(one) }}</li>{% endfor %}
</ul>
{% if machine.pods %}
<p>Pods <code>{{ machine.subnet }}</code></p>
<ul class="where-parts where-pods">
{% for one in machine.pods %}
<li><b>{{ one.workload }}</b><code>{{ one.address }}</code>{{ facts(one) }}{% if one.addon %}<em>add-on {{ one.addon }}</em>{% endif %}</li>
{% endfor %}
</ul>
{% endif %}
</li>
{% endfor %}
</ul>
{% endmacro %}
<div class="where" role="group" aria-label="What runs where">
<div class="where-place">
<p><b>your machine</b></p>
<ul class="where-parts">
<li><b>notebook</b><span>a Python process</span></li>
{% for one in brokers %}
<li><b>{{ one.name }}</b><code>{{ one.notebook }}</code>{% if one.pods %}<code>{{ one.pods }}</code>{% endif %}{{ facts(one) }}</li>
{% endfor %}
</ul>
{% if bridge %}
<p class="where-cable"><b>{{ bridge.link }}</b> <code>{{ bridge.address }}</code></p>
<div class="where-switch">
<p><b>bridge</b> <code>{{ bridge.subnet }}</code> in the network namespace <code>{{ bridge.namespace }}</code></p>
{{ cluster() }}
</div>
{% endif %}
</div>
{% if machines and not bridge %}
<div class="where-place">
<p><b>your cluster</b></p>
{{ cluster() }}
</div>
{% endif %}
</div>
""")
"""Nested boxes with text in them, to be read with eyes and with a screen reader."""


def picture(told: dict[str, Any]) -> str:
    """The machines and what runs on them, as HTML."""
    return "".join(line.strip() for line in PICTURE.render(told).splitlines())


def address_rows(told: dict[str, Any]) -> list[list[str]]:
    """What answers at which address, and for whom. Addresses that are drawn at random are left out."""
    bridge, machines = told["bridge"], told["machines"]
    all_of_it = "your machine, nodes and Pods"
    rows = []
    for one in [one for machine in machines for one in machine["components"] if one.get("address")]:
        who = {"etcd": "the API server, and a lesson that looks into it", "kubelet": "the API server"}.get(one["name"], all_of_it)
        rows.append([one["name"], one["address"], who])
    for service in told["services"]:
        ports = "port " + ", ".join(map(str, service["ports"]))
        if service["name"] in ("kubernetes", "kube-dns"):
            rows.append([f"the Service {service['name']}, {ports}", service["address"], "nodes and Pods"])
        if service["outside"]:
            rows.append([f"the Service {service['name']}, {ports}", ", ".join(service["outside"]), all_of_it])
    if bridge:
        rows.append(["Services", settings.SERVICE_CIDR, "nodes and Pods"])
        rows.append(["Services of type LoadBalancer", bridge["services"], all_of_it])
    rows += [[f"Pods of {machine['name']}", machine["subnet"], "nodes and Pods"] for machine in machines if machine["subnet"]]
    for one in told["brokers"]:
        rows.append([one["name"], one["notebook"], "your machine"])
        rows += [[one["name"], one["pods"], "Pods"]] if one.get("pods") else []
    return rows


def addon_rows(told: dict[str, Any]) -> list[list[str]]:
    """Each add-on: what it is, what it brings, and what its Pods take."""
    rows = []
    for name, addon in addons.every().items():
        own = [pod for machine in told["machines"] for pod in machine["pods"] if pod["addon"] == name]
        counted = Counter(f"{pod['kind']} {pod['workload']}" for pod in own)
        pods = ", ".join(f"{workload}{f' × {count}' if count > 1 else ''}" for workload, count in sorted(counted.items()))
        rows.append(
            [
                name,
                addon.told["title"],
                addon.told["about"],
                pods or "–",
                f"{sum(pod['memory'] for pod in own) / 1e6:.0f} MB" if own else "–",
            ]
        )
    return rows
