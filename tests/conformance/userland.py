"""The images that Kubernetes' tests ask for, written here: upstream's own programs, on Debian's packages in place of Alpine's.

Only upstream's programs are built from upstream's source. The shell, dig, curl, nginx and so on are those of Debian.
"""

from __future__ import annotations

import io
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from lab import binaries, images, settings
from lab.errors import BuildFailed
from lab.report import Report

MODULE = binaries.Module(
    "conformance",
    Path(__file__).resolve().parent,
    "Kubernetes' own tests",
    f"-s -w -X k8s.io/component-base/version.gitVersion=v{settings.KUBERNETES}",
    upstream={f"images/{name}": f"k8s.io/kubernetes:test/images/{name}" for name in ("agnhost/porter", "kitten/html", "nautilus/html")},
    tests=("k8s.io/kubernetes/test/e2e",),
)
"""Its `tool` line of test/e2e gives no program: it pins what the tests import."""

PACKAGES = ("busybox-static", "bash-static", "bind9-dnsutils", "libc-bin", "curl", "netcat-openbsd", "iproute2", "nginx")
"""Of Debian or Ubuntu. What they depend on comes with them, whatever this machine has: apt is told that it has nothing."""
SHELL = "usr/bin/bash-static"
"""What `sh` is. Debian's busybox would run its own nc and ip before those on PATH, and drop variables such as `data-1`."""
UNNEEDED = re.compile(r"usr/share/(?!nginx)|usr/lib/systemd/|lib/systemd/|etc/(init\.d|cron\.|apparmor|logrotate)")
MERGED = {"bin": "usr/bin", "sbin": "usr/bin", "usr/sbin": "bin", "lib": "usr/lib", "lib64": "usr/lib64"}
"""Links in the root of the images, as on today's distributions. `usr/sbin` is one too, so that PATH needs only /bin."""
ACCOUNTS = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\n"
    b"user-defined-in-image:x:1000:1000::/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\nwww-data:x:33:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"
    b"nogroup:x:65534:\n",
    "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
}
"""The users and groups of upstream's Dockerfiles."""


class Layer:
    """An image's layer under construction: a tar archive whose folders come before what is in them, each path once."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def put(self, entry: tarfile.TarInfo, content: bytes = b"") -> None:
        """Add one entry unless there is one of its name."""
        if not entry.name or entry.name in self._entries:
            return
        if parent := entry.name.rpartition("/")[0]:
            self.folder(parent)
        self._entries[entry.name] = (entry, content)

    def folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder."""
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self.put(entry)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        entry = tarfile.TarInfo(path)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self.put(entry)

    def file(self, path: str, source: Path | bytes, mode: int = 0o644) -> None:
        """Add a file."""
        content = source if isinstance(source, bytes) else source.read_bytes()
        entry = tarfile.TarInfo(path)
        entry.size, entry.mode = len(content), mode
        self.put(entry, content)

    def close(self) -> bytes:
        """The finished layer."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for entry, content in self._entries.values():
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()


def place(name: str) -> str:
    """Where a package's file goes where /bin, /sbin and /lib are links."""
    name = name.removeprefix("./").rstrip("/")
    return re.sub(r"^(?:usr/)?s?bin/", "usr/bin/", re.sub(r"^(lib|lib64)/", r"usr/\1/", name))


def fetch(target: Path) -> list[Path]:
    """Fetch PACKAGES and what they need into a folder; nothing is installed.

    Raises:
        BuildFailed: There is no apt, or it could not.
    """
    if not shutil.which("apt-get"):
        raise BuildFailed("The tests' images are made of Debian's packages, and there is no apt-get.", "Run this on Debian or Ubuntu.")
    (target / "partial").mkdir(parents=True)
    (target / "status").touch()
    told = {"Debug::NoLocking": "1", "Dir::State::status": target / "status", "Dir::Cache::archives": target}
    options = [part for name, value in told.items() for part in ("-o", f"{name}={value}")]
    command = ["apt-get", *options, "--download-only", "-q", "-y", "--no-install-recommends", "install", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildFailed(
            f"apt-get could not fetch {' '.join(PACKAGES)}: {done.stderr.strip()[-300:]}", "Try `apt-get update`, then run it again."
        )
    return sorted(target.glob("*.deb"))


def debian(packages: Iterable[Path]) -> tuple[bytes, bytes]:
    """A layer with Debian's packages, busybox filling in what they lack; and one with a shell and busybox alone."""
    full, small = Layer(), Layer()
    for layer in (full, small):
        for path in ("usr", "usr/bin", "usr/lib", "usr/lib64", "etc", "proc", "sys", "dev", "root", "run", "var"):
            layer.folder(path)
        for path in ("tmp", "var/tmp"):
            layer.folder(path, 0o1777)
        for path, target in MERGED.items():
            layer.link(path, target)
        for path, content in ACCOUNTS.items():
            layer.file(path, content)
    applets: tuple[str, ...] = ()
    for package in packages:
        told = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(told)) as archive:
            for entry in archive:
                name = place(entry.name)
                content = archive.extractfile(entry).read() if entry.isfile() else b""
                if name == "usr/bin/busybox":
                    applets = _applets(content)
                if name in (SHELL, "usr/bin/busybox"):
                    small.file(name, content, 0o755)
                if not UNNEEDED.match(name):
                    entry.name = name
                    entry.linkname = place(entry.linkname) if entry.islnk() else entry.linkname
                    full.put(entry, content)
    full.link("usr/bin/nc", "nc.openbsd")
    for name in ("sh", "bash"):
        for layer in (full, small):
            layer.link(f"usr/bin/{name}", SHELL.rpartition("/")[2])
    full.link("etc/nginx/sites-enabled/default", "/etc/nginx/sites-available/default")
    for applet in applets:
        for layer in (full, small):
            layer.link(f"usr/bin/{applet}", "busybox")
    return full.close(), small.close()


def _applets(busybox: bytes) -> tuple[str, ...]:
    """What a busybox can be called."""
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        program = Path(scratch, "busybox")
        program.write_bytes(busybox)
        program.chmod(stat.S_IRWXU)
        return tuple(subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split())


NAMES = ("agnhost", "busybox", "glibc-dns-testing", "kitten", "nautilus", "nginx", "nonewprivs", "nonroot", "pause")
"""The images that are made, without registry and version."""


def wanted() -> list[str]:
    """Every image that the tests know, by its full name."""
    return subprocess.run([MODULE.folder / "e2e.test", "--list-images"], capture_output=True, text=True, check=True).stdout.split()


def recipes(full: bytes, small: bytes) -> Mapping[str, dict]:
    """What each image consists of, by its name without registry and version."""
    built, upstream, cluster = MODULE.folder, MODULE.folder / "upstream" / "images", binaries.CLUSTER.folder
    agnhost = Layer()
    agnhost.file("agnhost", built / "agnhost", 0o755)
    agnhost.link("agnhost-2", "agnhost")
    agnhost.folder("uploads")
    agnhost.file("coredns", cluster / "coredns", 0o755)
    for name in ("localhost.crt", "localhost.key"):
        agnhost.file(name, upstream / "agnhost" / "porter" / name)
    base = (full, agnhost.close())

    def zoo(name: str) -> bytes:
        layer = Layer()
        for path in sorted((upstream / name / "html").iterdir()):
            layer.file(path.name, path)
        return layer.close()

    nnp = Layer()
    nnp.file("usr/local/bin/nnp", built / "nonewprivs", 0o4755)
    pause = Path(shutil.which("catatonit") or "/usr/libexec/podman/catatonit")
    alone = Layer()
    for path, source in {"catatonit": pause, **images.libraries([pause])}.items():
        alone.file(path, source, 0o755)
    return {
        "agnhost": {"layers": base, "entrypoint": ("/agnhost",), "command": ("pause",)},
        "kitten": {"layers": (*base, zoo("kitten")), "entrypoint": ("/agnhost",), "command": ("test-webserver",)},
        "nautilus": {"layers": (*base, zoo("nautilus")), "entrypoint": ("/agnhost",), "command": ("test-webserver",)},
        "busybox": {"layers": (small,), "entrypoint": (), "command": ("sh",)},
        "glibc-dns-testing": {"layers": (full,), "entrypoint": (), "command": ("sh",)},
        "nginx": {"layers": (full,), "entrypoint": ("/bin/nginx", "-g", "daemon off;")},
        "nonewprivs": {"layers": (full, nnp.close()), "entrypoint": (), "command": ("nnp",)},
        "nonroot": {"layers": (small,), "entrypoint": (), "command": ("sh",), "user": "1234"},
        "pause": {"layers": (alone.close(),), "entrypoint": ("/catatonit", "-P")},
    }


def made(tags: Iterable[str], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Those of `tags` that there is a recipe for, each with the recipe's name. Upstream's private registry is left alone."""
    for tag in tags:
        registry, _, last = tag.rpartition("/")
        if registry.startswith("registry.k8s.io") and (name := last.partition(":")[0]) in names:
            yield tag, name


def archive(report: Report) -> Path:
    """The archive of the images, written when the pins or this file have changed.

    Raises:
        BuildFailed: It could not be written.
    """
    parts = [MODULE.key, binaries.CLUSTER.key]
    sources = [Path(__file__), Path(images.__file__)]
    key = binaries.key_of([*(part.encode() for part in parts), *(path.read_bytes() for path in sources)])
    target = settings.cache() / f"conformance-{key}.tar"

    def write() -> None:
        with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
            layers = debian(fetch(Path(scratch, "packages")))
        known = recipes(*layers)
        tags = made(wanted(), NAMES)
        images.write_archive(target, [images.Image(tag, **({"user": ""} | known[name])) for tag, name in tags])

    images.once(target, "conformance-*.tar", "Write the images of the tests", write, report)
    return target
