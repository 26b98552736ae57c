"""Bringing add-ons up on the embedded cluster; on a cluster brought along, looking for the like."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import yaml

from lab import access, addons, cluster, lifecycle, network, pki, settings
from lab.addons import Addon
from lab.errors import MissingPrerequisite, NotRunning, Unhealthy
from lab.report import Report

RECORD = "lab-addons"
"""The ConfigMap in kube-system that says which add-ons were applied, and by which sources."""
PATIENCE = 120.0
"""Seconds that an add-on may take until it is ready; it takes 15 at most on two idle cores."""


def up(report: Report, names: Iterable[str]) -> None:
    """Bring add-ons up on the embedded cluster, or find them there; on a cluster brought along, look for the like.

    Raises:
        LabError: There is no such add-on, or it could not be brought up.
    """
    for addon in addons.named(names):
        if not addon.in_cluster:
            addons.prepare(report, [addon])
        elif settings.own().cluster:
            _look_for(addon)
        else:
            _up(report, addon)


def _up(report: Report, addon: Addon) -> None:
    lab = settings.find()
    if lab is None or not lab.kubeconfig:
        raise NotRunning("No lab with a cluster is up.", access.START)
    run = functools.partial(cluster.kubectl, lab.kubeconfig)
    if applied(lab).get(addon.name) == addon.key:
        _wait(addon, run)
        return
    addons.prepare(report, [addon])
    _import(report, addon, lab, run)
    with report.step(f"Bring up {addon.told['title']}"):
        certificates = _certificates(addon, run)
        objects = _render(addon, lab, certificates)
        _apply(addon, objects, run)
        _wait(addon, run, objects)
        record = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": RECORD, "namespace": "kube-system"}}
        run(
            "apply",
            "--server-side",
            f"--field-manager=lab-{addon.name}",
            "-f",
            "-",
            stdin=yaml.safe_dump(record | {"data": {addon.name: addon.key}}),
        )


def applied(lab: settings.Lab) -> dict[str, str]:
    """The add-ons of the embedded cluster, with the key of the sources that each was applied from."""
    told = cluster.kubectl(lab.kubeconfig, "-n", "kube-system", "get", "configmap", RECORD, "--ignore-not-found", "-o", "json").stdout
    return json.loads(told).get("data", {}) if told.strip() else {}


def _import(report: Report, addon: Addon, lab: settings.Lab, run) -> None:
    """Give each node the images that it does not have. A lab started when they were built has them from the start."""
    nodes = json.loads(run("get", "nodes", "-o", "json").stdout)["items"]
    lacking = [
        node["metadata"]["name"]
        for node in nodes
        if not set(addon.tags) <= {name for image in node["status"].get("images", []) for name in image["names"]}
    ]
    if not lacking:
        return
    if os.geteuid():
        raise NotRunning(
            f"The nodes do not have the images of the add-on {addon.name} yet.", f"Run `lab addon {addon.name}` in a terminal."
        )
    with report.step(f"Import the images of {addon.told['title']}"):
        for name in lacking:
            with addon.archive.open("rb") as archive:
                done = lifecycle.ctr(lab, name, "images", "import", "-", stdin=archive)
            if done.returncode:
                raise Unhealthy(f"{name} did not take the images: {done.stderr.strip()[-300:]}", f"See `lab logs {name}/containerd`.")


def _certificates(addon: Addon, run) -> dict[str, str]:
    """Make the certificates that an add-on serves with, once per lab; the authority of each, base64, by its name."""
    found = {}
    for name, told in addon.told.get("certificates", {}).items():
        secret = run("-n", told["namespace"], "get", "secret", told["secret"], "--ignore-not-found", "-o", "json").stdout
        if secret.strip():
            found[f"{name}_CA"] = json.loads(secret)["data"]["ca.crt"]
            continue
        authority = pki.Authority(f"{told['secret']}-ca")
        issued = authority.issue(told["names"][0], server=tuple(told["names"]), client=False)
        data = {"tls.crt": issued.certificate, "tls.key": issued.key, "ca.crt": authority.certificate}
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        objects = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": told["namespace"]}},
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {"name": told["secret"], "namespace": told["namespace"]},
                "data": encoded,
            },
        ]
        done = run("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))
        if done.returncode:
            raise Unhealthy(
                f"The cluster did not take the certificate of {addon.name}: {done.stderr.strip()[-300:]}.", "See `lab logs kube-apiserver`."
            )
        found[f"{name}_CA"] = encoded["ca.crt"]
    return found


def _render(addon: Addon, lab: settings.Lab, values: dict[str, str]) -> list[dict]:
    """The add-on's objects: its kustomization, with this lab's values in it."""
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        for path in addon.source.glob("*.yaml"):
            shutil.copyfile(path, Path(scratch, path.name))
        if addon.module and (addon.module.folder / "upstream").exists():
            shutil.copytree(addon.module.folder / "upstream", Path(scratch, "upstream"))
        done = cluster.kubectl(lab.kubeconfig, "kustomize", scratch)
    if done.returncode:
        raise Unhealthy(
            f"The manifests of {addon.name} do not fit together: {done.stderr.strip()[-300:]}", f"Restore env/addons/{addon.name}."
        )
    values = values | {"ADDRESSES": network.service_addresses(lab.subnet)}
    text = re.sub(r"\$([A-Z_]+)\b", lambda found: values.get(found[1], found[0]), done.stdout)
    return [one for one in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if one]


def _apply(addon: Addon, objects: list[dict], run) -> None:
    definitions = [one for one in objects if one["kind"] == "CustomResourceDefinition"]
    others = [one for one in objects if one["kind"] != "CustomResourceDefinition"]
    apply = ("apply", "--server-side", "--force-conflicts", "--validate=false", "-f", "-")
    if definitions:
        done = run(*apply, stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": definitions}), timeout=PATIENCE)
        names = [f"crd/{one['metadata']['name']}" for one in definitions]
        if not done.returncode:
            done = run("wait", "--for=condition=Established", "--timeout=60s", *names, timeout=PATIENCE)
        if done.returncode:
            raise Unhealthy(
                f"The cluster did not take the definitions of {addon.name}: {done.stderr.strip()[-300:]}.", "See `lab logs kube-apiserver`."
            )
    end = time.monotonic() + PATIENCE
    while (done := run(*apply, stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": others}), timeout=PATIENCE)).returncode:
        if "no matches for kind" not in done.stderr or time.monotonic() > end:
            raise Unhealthy(
                f"The cluster did not take the add-on {addon.name}: {done.stderr.strip()[-300:]}.", "See `lab logs kube-apiserver`."
            )


def _wait(addon: Addon, run, objects: list[dict] | None = None) -> None:
    """Wait until the add-on's workloads are rolled out and its conditions hold."""
    if objects is not None:
        for one in objects:
            if one["kind"] in ("Deployment", "DaemonSet"):
                metadata = one["metadata"]
                command = (
                    "-n",
                    metadata["namespace"],
                    "rollout",
                    "status",
                    f"{one['kind']}/{metadata['name']}",
                    f"--timeout={PATIENCE:.0f}s",
                )
                _must(addon, run(*command, timeout=PATIENCE + 10))
    for condition in addon.told.get("ready", []):
        what, _, name = condition.partition("=")
        command = (
            "-n",
            addon.told.get("ready_namespace", "default"),
            "wait",
            f"--for=condition={name}",
            what,
            f"--timeout={PATIENCE:.0f}s",
        )
        _must(addon, run(*command, timeout=PATIENCE + 10))


def _must(addon: Addon, done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        raise Unhealthy(
            f"{addon.told['title']} did not become ready: {done.stderr.strip()[-300:]}.", "Look with `lab kubectl get pods -A`."
        )


def _look_for(addon: Addon) -> None:
    """Look whether a cluster brought along offers what the add-on would.

    Raises:
        MissingPrerequisite: It does not.
    """
    from kubernetes import client, config

    api = config.new_client_from_config(access.variables(brokers=False)["KUBECONFIG"])
    if addon.name == "storage":
        classes = client.StorageV1Api(api).list_storage_class().items
        offered = any((one.metadata.annotations or {}).get("storageclass.kubernetes.io/is-default-class") == "true" for one in classes)
        lacks = "a default StorageClass"
    elif addon.name == "metrics":
        offered = any(group.name == "metrics.k8s.io" for group in client.ApisApi(api).get_api_versions().groups)
        lacks = "the Metrics API (metrics-server)"
    elif addon.name == "gateway":
        groups = {group.name for group in client.ApisApi(api).get_api_versions().groups}
        offered = "gateway.networking.k8s.io" in groups and bool(client.NetworkingV1Api(api).list_ingress_class().items)
        lacks = "an Ingress controller and the Gateway API (Contour, for one)"
    else:
        return
    if not offered:
        raise MissingPrerequisite(
            f"Your cluster does not offer {lacks}, which this lesson needs.",
            "Ask its administrator, or run the lesson on the embedded lab.",
        )
