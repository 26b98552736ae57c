"""How a shell or a notebook reaches the cluster and the brokers: the embedded ones, or those brought along."""

from __future__ import annotations

import os
from pathlib import Path

from lab import addons, settings
from lab.errors import NotRunning

START = "Start the lab with `lab up` (or `make lab`, which opens JupyterLab too)."


def variables(*, cluster: bool = True, brokers: bool = True) -> dict[str, str]:
    """The variables that connect a process to what runs.

    Args:
        cluster: Whether a cluster is wanted.
        brokers: Whether brokers are wanted.

    Raises:
        NotRunning: Neither of what is wanted runs.
    """
    own, lab = settings.own(), settings.find()
    found: dict[str, str] = {}
    if cluster and own.cluster:
        from lab import byo

        found["KUBECONFIG"] = str(byo.kubeconfig(own.cluster))
    elif cluster and lab and lab.kubeconfig:
        if not os.access(lab.kubeconfig, os.R_OK):
            raise NotRunning(
                f"{lab.kubeconfig} belongs to another user of this machine.",
                "Ask them for a cluster of your own, or name one with LAB_CLUSTER.",
            )
        found["KUBECONFIG"] = lab.kubeconfig
    if brokers and own.brokers:
        found["BOOTSTRAP"] = own.brokers
    elif brokers and lab and lab.bootstrap:
        found["BOOTSTRAP"] = lab.bootstrap
    if not found:
        raise NotRunning("No lab is up.", START)
    built = addons.programs()
    if lab and lab.kubeconfig and (folder := _binaries(Path(lab.cache))):
        found["KUBECACHEDIR"] = str(settings.cache() / "kubectl")
        built.insert(0, folder)
    if built:
        found["PATH"] = os.pathsep.join([*built, *(part for part in os.environ.get("PATH", "").split(os.pathsep) if part not in built)])
    return found


def _binaries(cache: Path) -> str:
    folders = [path.parent for path in cache.glob("cluster-*/kubectl") if not path.parent.name.endswith(".new")]
    return str(max(folders, key=lambda folder: folder.stat().st_mtime)) if folders else ""


def environment(*, cluster: bool = True, brokers: bool = False) -> dict[str, str]:
    """This process's environment with `variables` in it."""
    return {"PATH": os.defpath, **os.environ, **variables(cluster=cluster, brokers=brokers)}
