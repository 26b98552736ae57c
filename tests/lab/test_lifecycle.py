"""Starting and stopping, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lab import lifecycle

from ..conftest import INSTANCE, PORT, STATE, Lab, changed, machine, traces

MOMENTS = ("", "Write certificates", "Lay the network", "The API server answers", "Ready")
"""The line of `lab up` after which it is ended; the first is at once."""


def interrupt(lab: Lab, moment: str, how: signal.Signals, *options: str) -> int:
    """Start `lab up`, wait for the line that holds `moment`, and end it."""
    process = lab.start("up", "--no-brokers", *options)
    if moment:
        for line in process.stdout:
            if moment in line:
                break
    process.send_signal(how)
    said, _ = process.communicate(timeout=120)
    print(said)
    return process.returncode


def power_cut() -> None:
    """End every process of the lab at once; those in a machine end with it."""
    for process in lifecycle.processes(STATE):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_down_leaves_nothing_behind(lab: Lab) -> None:
    lab.well("down", "--force")
    before = machine()
    lab.well("up")
    assert len(traces()) > 10
    assert {"links", "routes", "cgroups"} <= {line.partition(":")[0] for line in changed(before)}
    lab.well("down")
    assert traces() == []
    assert changed(before, patience=20) == []


@pytest.mark.parametrize("how", [signal.SIGKILL])
def test_up_killed_at_any_moment_and_run_again(lab: Lab, how: signal.Signals) -> None:
    lab.well("down", "--force")
    for moment in MOMENTS:
        assert interrupt(lab, moment, how) == -how
    lab.well("up", "--no-brokers")
    assert lab.kubectl("get", "nodes", "-o=name").split() == ["node/node-1", "node/node-2"]
    lab.well("down")
    assert traces() == []


def test_down_after_a_killed_up(lab: Lab) -> None:
    interrupt(lab, "Lay the network", signal.SIGKILL)
    assert traces() != []
    lab.well("down")
    assert traces() == []


def test_control_c_undoes_what_was_begun(lab: Lab) -> None:
    lab.well("down", "--force")
    assert interrupt(lab, "Lay the network", signal.SIGINT) == 130
    assert traces() == []


def test_of_two_ups_at_once_one_waits(lab: Lab) -> None:
    lab.well("down", "--force")
    both = [lab.start("up", "--no-brokers") for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for it" in one for one in said) == 1, said
    assert sum("up already" in one for one in said) == 1, said


def test_a_lab_whose_processes_are_gone_comes_back_with_its_objects(lab: Lab) -> None:
    lab.well("up", "--no-brokers")
    lab.kubectl("create", "configmap", "kept", "--from-literal=a=1")
    power_cut()
    assert "processes are gone" in lab("status").stdout
    lab.well("up", "--no-brokers")
    assert lab.kubectl("get", "configmap", "kept", "-o=jsonpath={.data.a}") == "1"
    lab.well("down")
    assert traces() == []


def test_a_dead_lab_of_another_checkout_is_cleaned_away(lab: Lab, tmp_path: Path) -> None:
    lab.well("up", "--no-brokers")
    power_cut()
    for name in ("lab.json", "installed"):
        told = json.loads((STATE / name).read_text())
        (STATE / name).write_text(json.dumps(told | {"checkout": str(tmp_path)}))
    lab.well("up", "--no-brokers")
    assert lab.kubectl("get", "nodes", "-o=name").split() == ["node/node-1", "node/node-2"]
    lab.well("down")
    assert traces() == []


def test_a_port_in_use_is_named_and_nothing_is_begun(lab: Lab) -> None:
    lab.well("down", "--force")
    with socket.create_server(("127.0.0.1", PORT)):
        said = lab.fails("up")
    assert f"{PORT} by python (pid {os.getpid()})" in said or f"{PORT} by pytest" in said, said
    assert traces() == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"nodes": 7}', "Ünï".encode("utf-16")])
def test_a_broken_state_file_is_no_obstacle(lab: Lab, content: bytes) -> None:
    STATE.mkdir(exist_ok=True)
    for name in ("lab.json", "installed"):
        (STATE / name).write_bytes(content)
    lab("status")
    lab.well("down")
    assert traces() == []


def test_commands_without_a_lab_say_so(lab: Lab) -> None:
    lab.well("down", "--force")
    assert lab("status").stdout.strip() == "No lab is up. Start it with `lab up`."
    assert lab("status").returncode == 1
    for command in (["kubectl", "get", "nodes"], ["env"], ["node", "restart", "node-1"]):
        assert "No lab is up" in lab.fails(*command)
    assert lab.well("down").strip() == "No lab was up."


def test_a_cache_that_cannot_be_written_is_one_line(lab: Lab) -> None:
    lab.well("down", "--force")
    assert "/proc/nothing" in lab.fails("up", LAB_CACHE="/proc/nothing")
    assert traces() == []


def without_network(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run shell lines, in which `lab` is the command, where there is a loopback and nothing else."""
    inside = f'lab() {{ "{sys.executable}" -m lab "$@"; }}; ip link set lo up; {script}'
    own = {"LAB_INSTANCE": INSTANCE} | environment
    return subprocess.run(["unshare", "--net", "sh", "-ec", inside], env=os.environ | own, capture_output=True, text=True, timeout=300)


def test_once_built_it_needs_no_network(lab: Lab) -> None:
    lab.well("down", "--force")
    done = without_network("lab up; lab status; lab kubectl get nodes; lab down")
    assert done.returncode == 0, done.stdout + done.stderr
    assert traces() == []


def test_without_network_and_cache_it_says_what_it_lacks(lab: Lab, tmp_path: Path) -> None:
    lab.well("down", "--force")
    done = without_network("lab up", LAB_CACHE=str(tmp_path))
    assert done.returncode == 1
    complaints = [line for line in done.stderr.splitlines() if line.startswith("lab: ")]
    assert len(complaints) == 1, done.stderr
    assert "could not be" in complaints[0], done.stderr
    assert "network" in complaints[0], done.stderr
    assert "Traceback" not in done.stderr
    assert traces() == []
