"""Every process of the lab is gone at once, as in a power cut."""

from __future__ import annotations

import contextlib
import functools
import time

import psutil
import pytest

from lab import lifecycle

from ..conftest import STATE, traces
from ..conftest import until as wait_until
from .conftest import PATIENCE, Broken, Writer, template, workload

until = functools.partial(wait_until, limit=PATIENCE)
pytestmark = pytest.mark.slow


def power_cut() -> None:
    """End every process of the lab at once; those in a machine end with it."""
    for process in lifecycle.processes(STATE):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def shop_with_a_volume() -> tuple[dict, dict]:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "orders"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
    }
    pod = template("shop", volumeMounts=[{"name": "orders", "mountPath": "/orders"}])
    pod["spec"]["volumes"] = [{"name": "orders", "persistentVolumeClaim": {"claimName": "orders"}}]
    return claim, workload("Deployment", "shop", pod, replicas=1)


def in_shop(broken: Broken, program: str) -> str:
    return broken.kubectl("exec", "deployment/shop", "--", "python3", "-c", program).stdout.strip()


def test_power_is_cut(broken: Broken) -> None:
    broken.lab.well("addon", "storage")
    broken.stays()
    assert broken.apply(*shop_with_a_volume())
    until(lambda: broken.ready("deployment", "shop"))
    written = "import os; f = open('/orders/one', 'w'); f.write('kept'); f.flush(); os.fsync(f.fileno()); print('written')"
    assert in_shop(broken, written) == "written"
    before = broken.restarts("shop")
    with Writer("before-the-cut") as writer:
        writer.goes_on()
        power_cut()
    assert writer.acknowledged
    assert "dead: its processes are gone; `lab up` starts it again" in " ".join(broken.lab("status").stdout.split())
    assert broken.lab("status").returncode == 1
    assert "No route to host" in (said := broken.lab("kubectl", "get", "nodes").stdout) or "onnection" in said, said
    start = time.monotonic()
    broken.lab.well("up")
    assert broken.kept()
    until(lambda: broken.restarts("shop") > before)
    until(lambda: broken.ready("deployment", "shop") and broken.ready("daemonset", "stays"))
    seconds = time.monotonic() - start
    assert until(lambda: in_shop(broken, "print(open('/orders/one').read())")) == "kept"
    assert writer.lost() == set()
    broken.runs_pods()
    broken.well()
    broken.tell(
        "power cut of the whole lab",
        "`lab status`: dead: its processes are gone; `lab up` starts it again",
        seconds,
        f"every object; the volume; all {len(writer.acknowledged)} acknowledged messages",
    )


def test_down_after_a_power_cut_leaves_nothing(broken: Broken) -> None:
    broken.stays()
    assert broken.in_pods("app=stays")
    power_cut()
    start = time.monotonic()
    broken.lab.well("down")
    assert traces() == []
    broken.tell("power cut, then `lab down`", "Take the lab down", time.monotonic() - start, "nothing, as it should be")
