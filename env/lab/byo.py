"""Bring your own: a cluster named by LAB_CLUSTER, brokers named by LAB_BROKERS, checked before a lesson relies on them."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import yaml
from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import ConfigNode, KubeConfigMerger
from urllib3.exceptions import HTTPError

from lab import images, pki, settings
from lab.checks import wait
from lab.errors import LabError, MissingPrerequisite, NotRunning

OLDEST = (1, 33)
"""The oldest Kubernetes that every lesson runs on: the native `sleep` of preStop hooks is stable since 1.34 and on by default since 1.30,
sidecar containers are stable since 1.33."""
NEEDED = (
    ("create", "", "namespaces"),
    ("create", "apps", "deployments"),
    ("create", "", "pods"),
    ("get", "", "pods/log"),
    ("create", "", "pods/exec"),
    ("create", "", "services"),
    ("watch", "discovery.k8s.io", "endpointslices"),
)


def kubeconfig(context: str) -> Path:
    """A kubeconfig, in the cache and private, that holds this context alone and has it as the current one.

    Raises:
        LabError: There is no such context.
    """
    source = os.environ.get("LAB_KUBECONFIG") or os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")
    try:
        merged = _plain(KubeConfigMerger(source).config)
        contexts = {entry["name"]: entry["context"] for entry in merged.get("contexts") or []}
    except (ConfigException, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        known = isinstance(error, (ConfigException, yaml.YAMLError, OSError))
        there = any(Path(part).exists() for part in source.split(os.pathsep) if part)
        why = str(error).splitlines()[0].rstrip(".") if known else "it is not a kubeconfig" if there else "there is no such file"
        raise LabError(f"No kubeconfig can be read at {source}: {why}.", "Set KUBECONFIG to the file that has your context.") from None
    if context not in contexts:
        raise LabError(f"{source} has no context {context!r}.", f"It has: {', '.join(sorted(contexts)) or 'none'}.")
    wanted = contexts[context]
    chosen = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "contexts": [{"name": context, "context": wanted}],
        "clusters": [entry for entry in merged.get("clusters") or [] if entry["name"] == wanted.get("cluster")],
        "users": [entry for entry in merged.get("users") or [] if entry["name"] == wanted.get("user")],
    }
    target = settings.cache() / "contexts" / f"{''.join(letter if letter.isalnum() or letter in '-_.' else '_' for letter in context)}.yaml"
    text = yaml.safe_dump(chosen)
    if not target.exists() or target.read_text() != text:
        pki.write_private(target, text)
    return target


def _plain(node: object) -> object:
    """A merged kubeconfig as dicts, lists and strings alone."""
    node = node.value if isinstance(node, ConfigNode) else node
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list) else node


def examine() -> list[str]:
    """Check what was brought along: a line on each.

    Raises:
        LabError: It does not answer, is too old, or lacks a permission.
    """
    own = settings.own()
    return ([check_cluster(own.cluster)] if own.cluster else []) + ([check_brokers(own.brokers)] if own.brokers else [])


def check_cluster(context: str) -> str:
    """Check version and permissions of a cluster and describe it in a line.

    Raises:
        LabError: It does not answer, is too old, or lacks a permission.
    """
    path = kubeconfig(context)
    try:
        with config.new_client_from_config(str(path)) as api:
            told = client.VersionApi(api).get_code(_request_timeout=10)
            version = (int(told.major), int("".join(filter(str.isdigit, told.minor))))
            if version < OLDEST:
                raise MissingPrerequisite(
                    f"The cluster of context {context!r} is Kubernetes {told.git_version}.",
                    f"The lessons need {OLDEST[0]}.{OLDEST[1]} or later.",
                )
            review = client.AuthorizationV1Api(api)
            for verb, group, resource in NEEDED:
                name, _, sub = resource.partition("/")
                attributes = client.V1ResourceAttributes(
                    verb=verb, group=group, resource=name, subresource=sub or None, namespace="default"
                )
                body = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
                if not review.create_self_subject_access_review(body, _request_timeout=10).status.allowed:
                    raise MissingPrerequisite(
                        f"In the cluster of context {context!r} you may not {verb} {resource}.", "Ask its administrator for that right."
                    )
            nodes = len(client.CoreV1Api(api).list_node(_request_timeout=10).items)
            _check_images(client.CoreV1Api(api), context)
    except ConfigException as error:
        raise LabError(
            f"The context {context!r} cannot be used: {str(error).splitlines()[0]}.", f"Try `kubectl --context={context} get nodes`."
        ) from None
    except client.ApiException as error:
        raise LabError(
            f"The cluster of context {context!r} refused: {error.status} {error.reason}.", "Check the credentials of that context."
        ) from None
    except (HTTPError, OSError) as error:
        raise NotRunning(
            f"The cluster of context {context!r} does not answer: {type(error).__name__}.", f"Try `kubectl --context={context} get nodes`."
        ) from None
    return f"Your cluster {context}: Kubernetes {told.git_version}, {nodes} node(s)."


def _check_images(api: client.CoreV1Api, context: str) -> None:
    """Start a Pod of a demo image: only the cluster itself can say whether it has or gets it."""
    image = images.name("client:v1")
    container = {"name": "try", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["python3", "-c", "pass"]}
    pod = {"metadata": {"generateName": "by-experiment-image-"}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    name = api.create_namespaced_pod("default", pod).metadata.name
    reason = ""

    def decided() -> bool:
        nonlocal reason
        status = api.read_namespaced_pod_status(name, "default").status
        waiting = next((one.state.waiting.reason for one in status.container_statuses or [] if one.state.waiting), "") or ""
        reason = waiting if "Image" in waiting else ""
        return bool(reason) or status.phase in ("Succeeded", "Failed", "Running")

    try:
        wait(f"a Pod of {image} in the cluster of context {context!r}", decided, limit=60)
    finally:
        api.delete_namespaced_pod(name, "default", grace_period_seconds=0)
    if reason:
        raise MissingPrerequisite(
            f"The cluster of context {context!r} does not have the image {image} ({reason}).",
            "`lab images` writes the archive: load it with `kind load image-archive` or the like, or push it to a registry and name that with LAB_IMAGES.",
        )


def check_brokers(servers: str) -> str:
    """Check that brokers answer and describe them in a line.

    Raises:
        NotRunning: None of them answers.
    """
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        with closing(KafkaAdminClient(bootstrap_servers=servers.split(","), bootstrap_timeout_ms=5000)) as admin:
            count = len(admin.describe_cluster()["brokers"])
    except (KafkaError, OSError, ValueError) as error:
        raise NotRunning(f"No broker answers at {servers}: {type(error).__name__}.", "Check LAB_BROKERS and that they run.") from None
    return f"Your brokers at {servers}: {count} in the cluster."
