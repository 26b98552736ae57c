"""An OCI registry for the length of a lesson: CNCF Distribution on a loopback port, holding everything in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from urllib.error import URLError

import yaml

from lab import addons
from lab.checks import wait

MANAGER = ("setpriv", "--pdeathsig", "KILL")
"""Ends the registry with the notebook's kernel, however that ends."""


@dataclass(frozen=True)
class Registry:
    """A registry under way.

    Args:
        address: Where it listens, e.g. "127.0.0.1:41234".
        process: Its process.
    """

    address: str
    process: subprocess.Popen

    @classmethod
    def start(cls) -> Registry:
        """Start a registry on a free port of loopback and set REGISTRY to its address.

        Raises:
            TimedOut: It did not answer.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        settings = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"inmemory": {}, "delete": {"enabled": True}},
            "http": {"addr": address},
        }
        program = addons.every()["helm"].module.folder / "registry"
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as configuration:
            yaml.safe_dump(settings, configuration)
            configuration.flush()
            process = subprocess.Popen(
                [*MANAGER, str(program), "serve", configuration.name],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
            )

            def answers() -> bool:
                try:
                    return urllib.request.urlopen(f"http://{address}/v2/", timeout=1).status == 200
                except (URLError, OSError):
                    return False

            wait("the registry to answer", answers, limit=20)
        os.environ["REGISTRY"] = address
        return cls(address, process)

    def end(self) -> None:
        """End it; everything in it is gone."""
        self.process.kill()
        self.process.wait()
