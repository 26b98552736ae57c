import os
import time
from pathlib import Path

import psutil
import pytest

from lab import settings
from lab.errors import NotRunning, Unhealthy
from lab.supervise import Program, Supervisor


def told(supervisor: Supervisor) -> dict[str, dict]:
    return {one["name"]: one for one in supervisor.processes()}


@pytest.fixture
def supervisor(tmp_path_factory: pytest.TempPathFactory):
    supervisor = Supervisor(tmp_path_factory.mktemp("s"))
    supervisor.write(
        [
            Program("sleeper", ("sleep", "1000"), environment={"PERCENT": "100%"}),
            Program("talker", ("sh", "-c", "echo '50% done' \"$0\"; sleep 1000", "a b")),
        ],
        settings.owner(),
    )
    supervisor.start({})
    yield supervisor
    supervisor.rpc.supervisor.shutdown()


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def persons(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment as a person may have it."""
    for name in ("TMPDIR", "HTTPS_PROXY", "LAB_IMAGES"):
        monkeypatch.setenv(name, "/the/persons")


@pytest.mark.usefixtures("persons")
def test_programs_get_nothing_of_the_persons_environment_but_what_the_lab_reads(supervisor: Supervisor) -> None:
    until(lambda: told(supervisor)["sleeper"]["pid"])
    given = psutil.Process(told(supervisor)["sleeper"]["pid"]).environ()
    assert not {"TMPDIR", "HTTPS_PROXY"} & set(given)
    assert (given["LAB_IMAGES"], given["PERCENT"], given["PATH"]) == ("/the/persons", "100%", os.environ["PATH"])


def test_programs_start_at_once_and_are_restarted_when_they_die(supervisor: Supervisor) -> None:
    until(lambda: all(one["statename"] == "RUNNING" for one in supervisor.processes()))
    first = told(supervisor)["sleeper"]["pid"]
    psutil.Process(first).kill()
    until(lambda: told(supervisor)["sleeper"]["pid"] not in (0, first))
    assert (supervisor.folder / "log" / "talker.log").read_text() == "50% done a b\n"


def test_what_is_killed_stays_dead_until_it_is_started(supervisor: Supervisor) -> None:
    until(lambda: told(supervisor)["sleeper"]["pid"])
    first = told(supervisor)["sleeper"]["pid"]
    supervisor.kill_program("sleeper")
    assert not psutil.pid_exists(first)
    time.sleep(1.5)
    assert told(supervisor)["sleeper"]["pid"] == 0
    supervisor.start_program("sleeper")
    assert told(supervisor)["sleeper"]["pid"] != 0


def test_the_control_socket_is_its_owners_alone(supervisor: Supervisor) -> None:
    assert (supervisor.folder / "control.sock").stat().st_mode & 0o077 == 0


def test_an_unknown_program_is_named(supervisor: Supervisor) -> None:
    with pytest.raises(NotRunning, match="nonsense"):
        supervisor.start_program("nonsense")


def test_without_a_supervisor_nothing_runs(tmp_path: Path) -> None:
    absent = Supervisor(tmp_path)
    assert (absent.running(), absent.processes()) == (False, [])
    with pytest.raises(Unhealthy):
        absent.wait_running(0.1)
    with pytest.raises(NotRunning):
        absent.kill_program("x")
