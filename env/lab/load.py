"""A load from inside the cluster, whose every request comes back as a row."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time

import pandas as pd
from kubernetes import client
from kubernetes.client import ApiException
from kubernetes.stream import stream
from urllib3.exceptions import HTTPError

from lab import checks
from lab.errors import LabError, Unhealthy
from lab.images import UNPRIVILEGED

SETTLED = 0.7
"""Seconds of requests before a block and after it, so that what happens in it is seen whole."""


class Load:
    """Requests on a fixed schedule, from a Pod: from shortly before its block until shortly after it.

    Args:
        namespace: Where the Pod runs.
        image: The image of `env/images/client`.
        url: Where to, as a Pod sees it.
        period: Seconds from one request to the next.
        limit: Seconds after which it ends by itself.
        timeout: Seconds after which a request has failed.
        keep_alive: "none", "all" or "half".

    Attributes:
        begin: When the block began (Unix s).
        end: When the block ended (Unix s).
    """

    def __init__(self, namespace: str, image: str, url: str, *, period: float, limit: float, timeout: float, keep_alive: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise LabError(f"{url!r} is not an address to send requests to.", 'Write it as a Pod sees it, e.g. "http://shop/".')
        if period <= 0:
            raise LabError(f"A load cannot have a period of {period} s.", "Write the seconds from one request to the next.")
        if keep_alive not in ("none", "all", "half"):
            raise LabError(f"keep_alive={keep_alive!r} is not understood.", 'Write "none", "all" or "half".')
        self._namespace, self._image = namespace, image
        self._name = f"client-{secrets.token_hex(3)}"
        self._arguments = [url, f"--period={period}", f"--seconds={limit}", f"--timeout={timeout}", f"--keep-alive={keep_alive}"]
        self._lines: list[dict] = []
        self._begun, self._ended = threading.Event(), threading.Event()
        self._settled = max(1, round(SETTLED / period))
        self.begin = self.end = 0.0

    def __enter__(self) -> Load:
        """Start the Pod and wait until it has been answered for a while.

        Raises:
            Unhealthy: It did not start.
        """
        api = client.CoreV1Api()
        user = int(UNPRIVILEGED.split(":")[0])
        api.create_namespaced_pod(
            self._namespace,
            {
                "metadata": {"name": self._name, "labels": {"app": "client"}},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 1,
                    "automountServiceAccountToken": False,
                    "containers": [
                        {
                            "name": "client",
                            "image": self._image,
                            "imagePullPolicy": "IfNotPresent",
                            "args": self._arguments,
                            "securityContext": {
                                "runAsNonRoot": True,
                                "runAsUser": user,
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                            },
                        }
                    ],
                },
            },
        )
        end = time.monotonic() + 60
        while (pod := api.read_namespaced_pod_status(self._name, self._namespace)).status.phase == "Pending":
            status = next(iter(pod.status.container_statuses or []), None)
            reason = status.state.waiting.reason if status and status.state.waiting else "no node takes it"
            if reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName") or time.monotonic() > end:
                api.delete_namespaced_pod(self._name, self._namespace)
                raise Unhealthy(
                    f"The load generator did not start: {reason} ({self._image}).",
                    "On a cluster of your own, load the demo images (`lab images` writes the archive), or name a registry that has them with LAB_IMAGES.",
                )
            time.sleep(0.05)
        threading.Thread(target=self._follow, daemon=True).start()
        if not self._begun.wait(30):
            api.delete_namespaced_pod(self._name, self._namespace)
            raise Unhealthy(
                f"Nothing answered the load generator at {self._arguments[0]} for 30 s.",
                f"Look at the Service and its endpoints: `lab kubectl -n {self._namespace} get services,endpointslices,pods`.",
            )
        self._await(self._settled)
        self.begin = time.time()
        return self

    def _await(self, count: int) -> None:
        checks.wait(f"{count} answers to the load generator", lambda: len(self._lines) >= count or self._ended.is_set(), every=0.02)

    def _follow(self) -> None:
        api = client.CoreV1Api()
        seen = 0
        while not self._ended.is_set():
            with contextlib.suppress(ApiException, HTTPError, OSError):
                lines = api.read_namespaced_pod_log(self._name, self._namespace, follow=True, _preload_content=False)
                pending = b""
                number = 0
                for chunk in lines.stream(4096):
                    *whole, pending = (pending + chunk).split(b"\n")
                    for line in whole:
                        number += 1
                        if number > seen:
                            seen = number
                            self._take(json.loads(line))
            time.sleep(0.05)

    def _take(self, line: dict) -> None:
        if "begin" in line:
            self._begun.set()
        elif "end" in line:
            self._ended.set()
        else:
            self._lines.append(line)

    def __exit__(self, error: type | None, *_: object) -> None:
        """Let some more requests pass, wait for the answers under way, fetch the rows and remove the Pod."""
        api = client.CoreV1Api()
        self.end = time.time()
        if error is None:
            self._await(len(self._lines) + self._settled)
        with contextlib.suppress(ApiException):
            stream(
                api.connect_get_namespaced_pod_exec,
                self._name,
                self._namespace,
                command=["python3", "-c", "import os; os.kill(1, 15)"],
                stdout=True,
                stderr=True,
                stdin=False,
                tty=False,
            )
        self._ended.wait(20)
        with contextlib.suppress(ApiException):
            api.delete_namespaced_pod(self._name, self._namespace)

    @property
    def requests(self) -> pd.DataFrame:
        """A row per request, in order: start (Unix s), seconds, status, version, pod, error, keep_alive, reused, ok."""
        frame = pd.DataFrame(
            list(self._lines), columns=["n", "start", "seconds", "status", "version", "pod", "error", "keep_alive", "reused"]
        )
        frame = frame.sort_values("n", ignore_index=True)
        return frame.assign(ok=frame["error"].isna())
