"""Processes under supervisord: the programs of one machine, or of the host, in one configuration file.

supervisord (https://supervisord.org) starts them, restarts what dies, keeps their logs, and answers on a
Unix socket that only the lab's owner can open.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.xmlrpc import SupervisorTransport

from lab import settings
from lab.errors import NotRunning, Unhealthy


@dataclass(frozen=True)
class Program:
    """One process to keep running.

    Args:
        name: Its name in `lab status` and `lab logs`.
        command: The argument vector.
        environment: Variables added to those of supervisord.
        user: The user to run as; "" keeps supervisord's.
        priority: Lower starts first.
        stop_signal: What `stop` sends before SIGKILL.
        stop_seconds: How long `stop` waits before SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    priority: int = 100
    stop_signal: str = "TERM"
    stop_seconds: int = 10


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def configuration(folder: Path, programs: Iterable[Program], owner: tuple[int, int]) -> str:
    """The supervisord configuration for `programs`, whose socket, pid file and logs lie in `folder`."""
    lines = [
        "[unix_http_server]",
        f"file={_escape(str(folder / 'control.sock'))}",
        "chmod=0700",
        f"chown={owner[0]}:{owner[1]}",
        "[supervisord]",
        f"pidfile={_escape(str(folder / 'supervisord.pid'))}",
        f"logfile={_escape(str(folder / 'log' / 'supervisord.log'))}",
        "logfile_maxbytes=1MB",
        "logfile_backups=1",
        "nodaemon=true",
        "silent=true",
        "minfds=1024",
        "umask=022",
        *(["user=root"] if os.geteuid() == 0 else []),
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in programs:
        variables = ",".join(f'{key}="{_escape(value)}"' for key, value in program.environment.items())
        lines += [
            f"[program:{program.name}]",
            f"command={_escape(shlex.join(program.command))}",
            f"priority={program.priority}",
            "autorestart=true",
            "startsecs=0",
            "startretries=1000000",
            f"stopsignal={program.stop_signal}",
            f"stopwaitsecs={program.stop_seconds}",
            "stopasgroup=false",
            "killasgroup=true",
            f"stdout_logfile={_escape(str(folder / 'log' / program.name))}.log",
            "redirect_stderr=true",
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=1",
            *([f"environment={variables}"] if variables else []),
            *([f"user={program.user}"] if program.user else []),
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Supervisor:
    """The supervisord whose configuration, socket, pid file and logs lie in one folder.

    Args:
        folder: That folder; short, since a Unix socket's path ends at 107 bytes.
    """

    folder: Path

    def write(self, programs: Iterable[Program], owner: tuple[int, int], seen_as: Path | None = None) -> None:
        """Write the configuration for `programs`.

        Args:
            programs: What to keep running.
            owner: The user and group id that may open the control socket.
            seen_as: Where the folder lies for a supervisord that has a root file system of its own.
        """
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        (self.folder / "supervisord.conf").write_text(configuration(seen_as or self.folder, programs, owner))

    @property
    def command(self) -> tuple[str, ...]:
        """The argument vector that runs this supervisord in the foreground."""
        return (sys.executable, "-m", "supervisor.supervisord", "-c", str(self.folder / "supervisord.conf"))

    def start(self, environment: Mapping[str, str], limit: float = 30) -> None:
        """Start supervisord in a session of its own, with nothing inherited, and wait until it answers.

        Args:
            environment: Variables added to PATH and `settings.environment()`.
            limit: Seconds to wait.

        Raises:
            Unhealthy: It ended, or did not answer in time.
        """
        inherited = {"PATH": os.environ.get("PATH", os.defpath), **settings.environment()}
        with open(os.devnull, "r+b") as null:
            process = subprocess.Popen(
                self.command, stdin=null, stdout=null, stderr=null, cwd="/", env=inherited | environment, start_new_session=True
            )
        self.wait_running(limit, alive=lambda: process.poll() is None)

    def wait_running(self, limit: float, alive: Callable[[], bool] = lambda: True) -> None:
        """Wait until supervisord answers. Asking wakes it, so that it starts its programs at once and not after its tick of a second.

        Args:
            limit: Seconds.
            alive: Whether there is still something to wait for.

        Raises:
            Unhealthy: It ended, or did not answer within the limit.
        """
        end = time.monotonic() + limit
        while not self.running():
            if not alive() or time.monotonic() > end:
                raise Unhealthy(f"supervisord did not start in {self.folder}.", f"Read {self.folder / 'log' / 'supervisord.log'}.")
            time.sleep(0.02)

    @property
    def rpc(self) -> xmlrpc.client.ServerProxy:
        """The XML-RPC interface (https://supervisord.org/api.html)."""
        transport = SupervisorTransport(None, None, f"unix://{self.folder / 'control.sock'}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)

    def running(self) -> bool:
        """Whether supervisord answers."""
        try:
            return self.rpc.supervisor.getState()["statename"] == "RUNNING"
        except (OSError, xmlrpc.client.Error, ValueError):
            return False

    def processes(self) -> list[dict]:
        """Name, statename, pid, start (Unix seconds) and more of each program; empty when supervisord is gone."""
        try:
            return self.rpc.supervisor.getAllProcessInfo()
        except (OSError, xmlrpc.client.Error):
            return []

    def kill_program(self, name: str) -> None:
        """SIGKILL one program and leave it dead until `start_program`.

        Raises:
            NotRunning: There is no such program, or no supervisord.
        """
        # Killed first, it would be restarted; told to stop first, it would end in an orderly way. A frozen one does neither.
        self._call("signalProcess", name, "STOP")
        self._call("stopProcess", name, False)
        self._call("signalProcess", name, "KILL")
        end = time.monotonic() + 5
        while any(told["name"] == name and told["statename"] == "STOPPING" for told in self.processes()) and time.monotonic() < end:
            time.sleep(0.01)

    def signal_program(self, name: str, signal: str) -> None:
        """Send one program a signal, e.g. "STOP" or "CONT".

        Raises:
            NotRunning: There is no such program, or no supervisord.
        """
        self._call("signalProcess", name, signal)

    def start_program(self, name: str) -> None:
        """Start one program that was stopped or killed.

        Raises:
            NotRunning: There is no such program, or no supervisord.
        """
        self._call("startProcess", name)

    def _call(self, method: str, *arguments: str | bool) -> None:
        try:
            getattr(self.rpc.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultString.startswith(("NOT_RUNNING", "ALREADY_STARTED")):
                return
            raise NotRunning(f"{arguments[0]}: {fault.faultString}.", "See `lab status` for the names.") from None
        except OSError:
            raise NotRunning("The lab does not answer.", "Start it with `lab up`.") from None
