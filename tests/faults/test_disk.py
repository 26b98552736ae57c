"""A disk is full: etcd's, containerd's, a broker's. Each gets a small file system of its own; the machine's disk is left alone."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import lifecycle
from lab.supervise import Supervisor

from ..conftest import STATE
from ..conftest import until as wait_until
from .conftest import PATIENCE, Broken, Writer, in_sync, template, workload

until = functools.partial(wait_until, limit=PATIENCE)
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small(broken: Broken, machine: str, program: str, megabytes: int) -> Iterator[Path]:
    """Move what a machine's component keeps to a file system of that size, seen on that machine alone; where it is on the host."""
    control = Supervisor(STATE / machine / "var" / "supervisor")
    inside = ["nsenter", f"--target={broken.init(machine).pid}", "--mount", "--pid", "sh", "-ec"]
    control.kill_program(program)
    subprocess.run(
        [*inside, f"mkdir /run/small; mount -t tmpfs -o mode=700,size={megabytes}m small /run/small; cp -a /var/lib/{program}/. /run/small; "
         f"mount --bind /run/small /var/lib/{program}"], check=True,
    )  # fmt: skip
    control.start_program(program)
    broken.well()
    yield Path(f"/proc/{broken.init(machine).pid}/root/run/small")


def fill(folder: Path) -> Path:
    """Write a file until there is no space left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), (folder / "more").open("wb", buffering=0) as file:
        file.write(bytes(1 << 12))
    (folder / "more").unlink(missing_ok=True)
    return filler


def config_map(number: int) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"large-{number}"},
        "data": {"text": f"{number:08}" * (96 << 10)},
    }


def create(broken: Broken, number: int) -> bool:
    """Whether the API server took the object. `kubectl apply` would repeat it in an annotation, which has to be smaller."""
    return broken.kubectl("create", "-f", "-", stdin=json.dumps(config_map(number))).returncode == 0


def test_etcds_disk_is_full(broken: Broken) -> None:
    broken.stays()
    pods = broken.in_pods("app=stays")
    with small(broken, "control-plane", "etcd", 224) as folder:
        assert create(broken, 0)
        filler = fill(folder)
        taken, refused = {0}, []
        for number in range(1, 200):
            if not create(broken, number):
                refused.append(number)
                break
            taken.add(number)
        assert refused, "a full disk took everything"
        until(lambda: broken.lab.rows()["control-plane/etcd"]["state"].startswith("its disk is full: 0 MB free at /var/lib/etcd"))
        assert broken.lab("status").returncode == 1
        seen = broken.lab.rows()["control-plane/etcd"]["state"]
        assert "no space left on device" in broken.lab.well("logs", "etcd", "-n", "100000")
        filler.unlink()
        start = time.monotonic()
        until(lambda: broken.kubectl("get", "--raw=/readyz").returncode == 0)
        broken.well()
        seconds = time.monotonic() - start
        found = {
            int(name.rpartition("-")[2]) for name in broken.kubectl("get", "configmaps", "-o=name").stdout.split() if "/large-" in name
        }
        assert taken <= found, "an object that the API server had taken is gone"
        for number in taken:
            assert broken.get("configmap", f"large-{number}")["data"] == config_map(number)["data"]
        assert broken.kept()
        broken.runs_pods()
        assert broken.in_pods("app=stays") == pods
    broken.tell(
        "disk full under etcd", f"`lab status`: etcd: {seen}", seconds, f"every object, the {len(taken)} of the last seconds too; every Pod"
    )


def test_containerds_disk_is_full(broken: Broken) -> None:
    broken.stays()
    pods = broken.in_pods("app=stays")
    size = int(
        subprocess.run(["du", "-sm", STATE / "node-1" / "var" / "lib" / "containerd"], capture_output=True, text=True).stdout.split()[0]
    )
    with small(broken, "node-1", "containerd", size + 64) as folder:
        filler = fill(folder)
        late = template("late")
        late["spec"]["nodeName"] = "node-1"
        assert broken.apply(workload("Deployment", "late", late, replicas=1))
        until(lambda: "no space left on device" in broken.kubectl("get", "events", "--field-selector=type=Warning").stdout)
        assert broken.lab.rows()["node-1/containerd"]["state"].startswith("its disk is full: 0 MB free at /var/lib/containerd")
        assert broken.lab("status").returncode == 1
        assert not broken.ready("deployment", "late")
        assert broken.in_pods("app=stays") == pods
        filler.unlink()
        start = time.monotonic()
        until(lambda: broken.ready("deployment", "late"))
        seconds = time.monotonic() - start
        broken.runs_pods()
        broken.well()
        assert broken.in_pods("app=stays") == pods
        assert broken.restarts("stays") == 0
    broken.tell(
        "disk full under containerd", "a Pod's events: no space left on device; `lab status`", seconds, "every Pod, with its processes"
    )


def test_a_brokers_disk_is_full(broken: Broken) -> None:
    data, control = STATE / "broker-1" / "data", lifecycle.supervisor(STATE)
    control.kill_program("broker-1")
    draft = data.with_name("before")
    data.rename(draft)
    data.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700,size=128m", "small", data], check=True)
    try:
        shutil.copytree(draft, data, dirs_exist_ok=True)
        control.start_program("broker-1")
        broken.well()
        with Writer("full-disk") as writer:
            filler = fill(data)
            until(lambda: broken.lab.rows()["broker-1"]["state"].startswith("its disk is full: 0 MB free at"))
            seen = broken.lab.rows()["broker-1"]["state"]
            assert broken.lab("status").returncode == 1
            until(lambda: "No space left on device" in broken.lab.well("logs", "broker-1", "-n", "100000"))
            writer.goes_on()
            filler.unlink()
            start = time.monotonic()
            broken.well()
            until(lambda: in_sync("full-disk") == 3)
            seconds = time.monotonic() - start
            writer.goes_on()
        assert writer.lost() == set()
        broken.tell(
            "disk full under broker-1",
            f"`lab status`: {seen.partition(' at ')[0]}",
            seconds,
            f"all {len(writer.acknowledged)} acknowledged messages; {len(writer.refused)} were refused",
        )
    finally:
        control.kill_program("broker-1")
        subprocess.run(["umount", "--lazy", data], check=False)
