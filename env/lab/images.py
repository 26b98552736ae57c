"""Container images written without Docker: the cluster's own two, and one per folder of `env/images`.

An image is a tar archive that `ctr images import`, `docker load` and `kind load image-archive` read
(https://github.com/moby/docker-image-spec). Layers are the same byte for byte when their content is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

from lab import binaries, settings
from lab.errors import BuildFailed
from lab.report import Report

SOURCES = settings.ENV / "images"
REPOSITORY = "localhost/by-experiment"
PACKAGES = "app/packages"
INTERPRETER = (sys.version.encode(), platform.machine().encode())
"""What the Python in the images is: a cache may be shared with a machine of another kind."""
UNPRIVILEGED = "65532:65532"
LEFT_OUT = {
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
}


def name(image: str) -> str:
    """The full name of a demo image, e.g. "shop:v1", as a manifest needs it (`LAB_IMAGES` names another repository)."""
    return f"{os.environ.get('LAB_IMAGES', REPOSITORY).rstrip('/')}/{image}"


@dataclass(frozen=True)
class Image:
    """One image of an archive.

    Args:
        tag: Its full name.
        layers: Its layers, lowest first: uncompressed tar archives.
        entrypoint: What it runs.
        environment: Its variables.
        user: The user and group it runs as.
        command: What the entrypoint gets where a Pod says nothing.
    """

    tag: str
    layers: tuple[bytes, ...]
    entrypoint: tuple[str, ...]
    environment: tuple[str, ...] = ()
    user: str = UNPRIVILEGED
    command: tuple[str, ...] = ()


def layer(files: Iterable[tuple[str, Path | bytes]]) -> bytes:
    """A layer with these files, each given as its path in the image and its source or content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        made: set[str] = set()

        def folder(path: str) -> None:
            if path and path not in made:
                folder(path.rpartition("/")[0])
                made.add(path)
                entry = tarfile.TarInfo(path)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if path == "tmp" else 0o755
                archive.addfile(entry)

        for path in ("tmp", "etc", "proc", "sys", "dev"):
            folder(path)
        for target, source in sorted(files, key=lambda pair: pair[0]):
            folder(target.rpartition("/")[0])
            content = source if isinstance(source, bytes) else source.read_bytes()
            entry = tarfile.TarInfo(target)
            entry.size = len(content)
            entry.mode = 0o755 if not isinstance(source, bytes) and os.access(source, os.X_OK) else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def libraries(programs: Iterable[Path]) -> dict[str, Path]:
    """The shared libraries that `programs` load, by their path in the image."""
    told = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True).stdout
    return {found.lstrip("/"): Path(found).resolve() for found in re.findall(r"(/\S+) \(0x", told)}


def _python(scratch: Path) -> bytes:
    """A layer with this interpreter, its standard library and their shared libraries, at /usr/local.

    Args:
        scratch: A file to write to.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    interpreter = Path(sys.executable).resolve()
    files: dict[str, Path | bytes] = {"usr/local/bin/python3": interpreter}
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [sub for sub in subfolders if sub not in LEFT_OUT and not sub.startswith("config-")]
        for one in names:
            source = Path(folder, one)
            target = f"usr/local/{sys.platlibdir}/{version}/{source.relative_to(library)}"
            files[target] = source
            if one.endswith(".py"):
                py_compile.compile(
                    str(source), cfile=str(scratch), dfile="/" + target, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
                )
                parent, _, stem = target.rpartition("/")
                files[f"{parent}/__pycache__/{stem[:-3]}.{sys.implementation.cache_tag}.pyc"] = scratch.read_bytes()
    scratch.unlink(missing_ok=True)
    extensions = [path for path in files.values() if isinstance(path, Path) and path.suffix == ".so"]
    files.update(libraries([interpreter, *extensions]))
    files["etc/passwd"] = b"root:x:0:0:root:/:/bin/false\napp:x:65532:65532:app:/tmp:/bin/false\n"
    files["etc/group"] = b"root:x:0:\napp:x:65532:\n"
    files["etc/nsswitch.conf"] = b"passwd: files\ngroup: files\nhosts: files dns\n"
    resolver = re.findall(r"(/\S*/)libc\.so\.6 \(0x", subprocess.run(["ldd", str(interpreter)], capture_output=True, text=True).stdout)
    for library_name in ("libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"):
        for place in resolver:
            if (path := Path(place, library_name)).exists():
                files[str(path).lstrip("/")] = path.resolve()
    return layer(files.items())


def of_programs(tag: str, programs: Iterable[Path], entrypoint: tuple[str, ...] = (), user: str = "") -> Image:
    """An image of programs in /bin, with the shared libraries that they load.

    Args:
        tag: Its full name.
        programs: The programs.
        entrypoint: What it runs; empty for the first program alone.
        user: The user and group it runs as; empty for an unprivileged one.
    """
    programs = list(programs)
    content = layer(({f"bin/{path.name}": path.resolve() for path in programs} | libraries(programs)).items())
    return Image(tag, (content,), entrypoint or (f"/bin/{programs[0].name}",), user=user or UNPRIVILEGED)


def _packages(names: Iterable[str]) -> bytes:
    """A layer with installed packages, without what they depend on, and the shared libraries that they load."""
    files: dict[str, Path | bytes] = {}
    for name in names:
        for file in distribution(name).files or ():
            path = Path(str(file.locate()))
            if path.is_file() and ".." not in file.parts and "__pycache__" not in file.parts:
                files[f"{PACKAGES}/{file}"] = path
    files.update(libraries(path for path in files.values() if isinstance(path, Path) and path.suffix == ".so"))
    return layer(files.items())


def write_archive(target: Path, images: Iterable[Image]) -> None:
    """Write an archive of images, whole or not at all."""
    draft = target.with_suffix(".new")
    manifest, written = [], set()
    with tarfile.open(draft, "w") as archive:

        def add(path: str, content: bytes) -> None:
            if path not in written:
                written.add(path)
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

        for image in images:
            digests = [hashlib.sha256(content).hexdigest() for content in image.layers]
            config = json.dumps(
                {
                    "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
                    "os": "linux",
                    "config": {
                        "Entrypoint": list(image.entrypoint),
                        "Env": ["PATH=/usr/local/bin:/bin", *image.environment],
                        "User": image.user,
                    }
                    | ({"Cmd": list(image.command)} if image.command else {}),
                    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
                }
            ).encode()
            for digest, content in zip(digests, image.layers, strict=True):
                add(f"{digest}/layer.tar", content)
            config_name = f"{hashlib.sha256(config).hexdigest()}.json"
            add(config_name, config)
            manifest.append({"Config": config_name, "RepoTags": [image.tag], "Layers": [f"{digest}/layer.tar" for digest in digests]})
        add("manifest.json", json.dumps(manifest).encode())
    draft.replace(target)


def _sources() -> list[tuple[Path, dict]]:
    """Each folder of `env/images` with its `image.toml`."""
    return [(path.parent, tomllib.loads(path.read_text())) for path in sorted(SOURCES.glob("*/image.toml"))]


def tags() -> list[str]:
    """The full name of each demo image."""
    return [name(f"{folder.name}:{tag}") for folder, told in _sources() for tag in told["tags"]]


def demo_archive(report: Report) -> Path:
    """The archive of the demo images, written when a source or this interpreter has changed.

    Raises:
        BuildFailed: It could not be written.
    """
    files = sorted(path for path in SOURCES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    key = binaries.key_of(
        [
            *INTERPRETER,
            Path(__file__).read_bytes(),
            *(part for path in files for part in (str(path.relative_to(SOURCES)).encode(), path.read_bytes())),
            *(f"{name} {version(name)}".encode() for _, told in _sources() for name in told.get("packages", ())),
        ]
    )
    target = settings.cache() / f"images-{key}.tar"

    def write() -> None:
        base = settings.cache() / f"python-{binaries.key_of([*INTERPRETER, Path(__file__).read_bytes()])}.tar.gz"
        if not base.exists():
            base.with_suffix(".new").write_bytes(gzip.compress(_python(base.with_suffix(".pyc")), 1, mtime=0))
            base.with_suffix(".new").replace(base)
            for old in base.parent.glob("python-*.tar.gz"):
                if old != base:
                    old.unlink(missing_ok=True)
        python = gzip.decompress(base.read_bytes())
        images = []
        for folder, told in _sources():
            packages = (_packages(told["packages"]),) if "packages" in told else ()
            own = layer((f"app/{path.name}", path.read_bytes()) for path in sorted(folder.glob("*.py")))
            images += [
                Image(
                    f"{REPOSITORY}/{folder.name}:{tag}",
                    (python, *packages, own),
                    tuple(told["entrypoint"]),
                    (
                        "PYTHONHOME=/usr/local",
                        f"PYTHONPATH=/{PACKAGES}",
                        "PYTHONUNBUFFERED=1",
                        "PYTHONDONTWRITEBYTECODE=1",
                        f"VERSION={tag}",
                    ),
                )
                for tag in told["tags"]
            ]
        write_archive(target, images)

    once(target, "images-*.tar", "Write the demo images", write, report)
    return target


def system_archive(report: Report) -> Path:
    """The archive of the images that the cluster itself needs: pause and CoreDNS.

    Raises:
        BuildFailed: It could not be written.
    """
    catatonit = shutil.which("catatonit") or next(
        (path for path in ("/usr/libexec/podman/catatonit", "/usr/libexec/catatonit/catatonit") if os.path.exists(path)), None
    )
    if catatonit is None:
        raise BuildFailed("There is no catatonit, the program that the pause image holds.", "Install the package catatonit.")
    target = (
        settings.cache()
        / f"system-{binaries.key_of([binaries.CLUSTER.key.encode(), Path(__file__).read_bytes(), Path(catatonit).read_bytes()])}.tar"
    )

    def write() -> None:
        pause = Path(catatonit)
        coredns = binaries.CLUSTER.folder / "coredns"
        write_archive(
            target,
            [
                Image(PAUSE, (layer({"catatonit": pause, **libraries([pause])}.items()),), ("/catatonit", "-P")),
                Image(COREDNS, (layer({"coredns": coredns}.items()),), ("/coredns",), user=UNPRIVILEGED),
            ],
        )

    once(target, "system-*.tar", "Write the images of pause and CoreDNS", write, report)
    return target


PAUSE = f"{REPOSITORY}/pause:1"
COREDNS = f"{REPOSITORY}/coredns:1"


def once(target: Path, earlier: str, title: str, write: Callable[[], None], report: Report) -> None:
    """Write a file of the cache if it is not there, and remove its earlier versions.

    Args:
        target: The file.
        earlier: The pattern of its versions' names.
        title: The step, as a person sees it.
        write: Writes it.
        report: Where the step is told.

    Raises:
        BuildFailed: It could not be written.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with report.alone(target.parent / "images.lock"):
        if target.exists():
            return
        with report.step(title):
            try:
                write()
            except OSError as error:
                raise BuildFailed(
                    f"{title}: {error.strerror or error} ({error.filename or target}).", "Free some disk, then run it again."
                ) from None
        for old in target.parent.glob(earlier):
            if old != target:
                old.unlink(missing_ok=True)
