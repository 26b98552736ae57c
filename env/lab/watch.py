"""Recording what a namespace's Pods and EndpointSlices do, as the API server tells it."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time

import pandas as pd
from kubernetes import client, watch
from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError


class Watch:
    """Records what is there at the start of its block and every change until its end.

    Times are Unix seconds, taken when the news arrived here.

    Args:
        namespace: The namespace to watch.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._pods: list[dict] = []
        self._slices: list[dict] = []
        self._capacity: list[dict] = []
        self._now: dict[str, tuple[str, list[client.V1Endpoint]]] = {}
        self._watches: list[watch.Watch] = []
        self._threads: list[threading.Thread] = []
        self._ended = False

    def __enter__(self) -> Watch:
        """Start watching."""
        core, discovery = client.CoreV1Api(), client.DiscoveryV1Api()
        for listing, record in ((core.list_namespaced_pod, self._pod), (discovery.list_namespaced_endpoint_slice, self._slice)):
            found = listing(self._namespace)
            for one in found.items:
                record("ADDED", one, time.time())
            version = found.metadata.resource_version
            self._watches.append(watch.Watch())
            self._threads.append(threading.Thread(target=self._run, args=(self._watches[-1], listing, version, record), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching; what was recorded stays."""
        self._ended = True
        for one in self._watches:
            one.stop()

    def _run(self, stream: watch.Watch, listing, version: str, record) -> None:
        while not self._ended:
            with contextlib.suppress(ApiException, HTTPError, OSError):
                for event in stream.stream(listing, self._namespace, resource_version=version, timeout_seconds=300):
                    if self._ended or event is None:
                        break
                    record(event["type"], event["object"], time.time())
                    version = event["object"].metadata.resource_version

    def _pod(self, kind: str, pod: client.V1Pod, at: float) -> None:
        status = next(iter(pod.status.container_statuses or []), None)
        ended = status and (status.state.terminated or (status.last_state and status.last_state.terminated))
        sigterm = None
        if ended and ended.message:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                sigterm = json.loads(ended.message)["sigterm"]
        self._pods.append(
            {
                "time": at,
                "event": kind,
                "pod": pod.metadata.name,
                "labels": pod.metadata.labels or {},
                "node": pod.spec.node_name,
                "phase": pod.status.phase,
                "ready": any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions or []),
                "image": pod.spec.containers[0].image,
                "deleted": _unix(pod.metadata.deletion_timestamp),
                "restarts": status.restart_count if status else 0,
                "exit_code": ended.exit_code if ended else None,
                "sigterm": sigterm,
            }
        )

    def _slice(self, kind: str, endpoints: client.V1EndpointSlice, at: float) -> None:
        service = (endpoints.metadata.labels or {}).get("kubernetes.io/service-name", "")
        found = (endpoints.endpoints or []) if kind != "DELETED" else []
        for endpoint in found:
            self._slices.append(
                {
                    "time": at,
                    "service": service,
                    "slice": endpoints.metadata.name,
                    "version": endpoints.metadata.resource_version,
                    "address": (endpoint.addresses or [""])[0],
                    "pod": endpoint.target_ref.name if endpoint.target_ref else "",
                    "ready": bool(endpoint.conditions.ready),
                    "serving": bool(endpoint.conditions.serving),
                    "terminating": bool(endpoint.conditions.terminating),
                }
            )
        self._now[endpoints.metadata.name] = service, found
        conditions = [one.conditions for of, those in self._now.values() if of == service for one in those]
        ready = sum(bool(one.ready) for one in conditions)
        serving = sum(bool(one.serving) for one in conditions)
        self._capacity.append({"time": at, "service": service, "ready": ready, "serving": serving})

    @property
    def pods(self) -> pd.DataFrame:
        """A row per change of a Pod: time (s), event, pod, labels, node, phase, ready, image, deleted (s), restarts, exit_code, sigterm (s)."""
        return pd.DataFrame(list(self._pods))

    @property
    def endpoints(self) -> pd.DataFrame:
        """A row per endpoint of each version of an EndpointSlice: time (s), service, slice, version, address, pod and its conditions."""
        return pd.DataFrame(list(self._slices))

    @property
    def capacity(self) -> pd.DataFrame:
        """A row per version of an EndpointSlice: time (s), service, and how many endpoints of the Service are ready and serving from then on."""
        return pd.DataFrame(list(self._capacity))


def _unix(moment: datetime.datetime | None) -> float | None:
    return moment.timestamp() if moment else None
