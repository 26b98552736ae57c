"""What one lesson needs of the cluster and others do not: a folder of `env/addons` each, prepared here, brought up by `provision`.

A folder holds the pins of its programs (go.mod, wheel.txt, jgo.lock.toml), the images and commands made of them (addon.toml), and
a kustomization of the manifests that its modules publish.
"""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab import binaries, images, settings
from lab.errors import BuildFailed, LabError, MissingPrerequisite
from lab.jars import LOCALE, Jars, java
from lab.report import Report

FOLDER = settings.ENV / "addons"


@dataclass(frozen=True)
class Addon:
    """One folder of `env/addons`.

    Args:
        name: The folder's name.
        told: What its addon.toml says.
    """

    name: str
    told: dict

    @property
    def source(self) -> Path:
        """Its folder."""
        return FOLDER / self.name

    @property
    def in_cluster(self) -> bool:
        """Whether it brings objects into the cluster, not only programs."""
        return (self.source / "kustomization.yaml").exists()

    @property
    def module(self) -> binaries.Module | None:
        """Its Go programs, if it has any."""
        if not (self.source / "go.mod").exists():
            return None
        flags = f"-s -w {self.told.get('flags', '')}".strip()
        return binaries.Module(f"addon-{self.name}", self.source, self.told["title"], flags, upstream=self.told.get("upstream", {}))

    @property
    def jars(self) -> Jars | None:
        """Its Java programs, if it has any."""
        lock = self.source / "jgo.lock.toml"
        return Jars(f"addon-{self.name}", self.told["title"], lock) if lock.exists() else None

    @property
    def folder(self) -> Path | None:
        """Where the programs are that a person runs, if it has any."""
        if self.told.get("commands"):
            parts = [json.dumps(self.told["commands"]), LOCALE, *java("")]
            return self.jars.home / f"bin-{binaries.key_of(part.encode() for part in parts)}"
        return self.module.folder if self.told.get("on_path") else None

    @property
    def key(self) -> str:
        """What a cluster that has the add-on got it from: its folder."""
        return binaries.key_of(path.read_bytes() for path in sorted(self.source.rglob("*")) if path.is_file())

    @property
    def archive(self) -> Path | None:
        """The archive of its images, if it has any of its own."""
        if not (told := self.told.get("images")):
            return None
        wheel = self.source / "wheel.txt"
        parts = [json.dumps(told).encode(), (self.module.key if self.module else "").encode()]
        parts += [path.read_bytes() for path in (wheel, Path(images.__file__)) if path.exists()]
        return settings.cache() / f"addon-{self.name}-{binaries.key_of(parts)}.tar"

    @property
    def prepared(self) -> bool:
        """Whether its programs are built and its images written."""
        places = [self.archive, self.folder, self.jars and self.jars.home]
        return (self.module is None or self.module.built) and all(place is None or place.exists() for place in places)

    @property
    def tags(self) -> list[str]:
        """The full names of its own images."""
        return [f"{images.REPOSITORY}/{image}:1" for image in self.told.get("images", {})]


@functools.cache
def every() -> dict[str, Addon]:
    """Each add-on by its name."""
    return {path.parent.name: Addon(path.parent.name, tomllib.loads(path.read_text())) for path in sorted(FOLDER.glob("*/addon.toml"))}


def named(names: Iterable[str]) -> list[Addon]:
    """The add-ons of these names.

    Raises:
        LabError: There is none of that name.
    """
    for name in names:
        if name not in every():
            raise LabError(f"There is no add-on {name!r}.", f"There are: {', '.join(every())}.")
    return [every()[name] for name in names]


def programs() -> list[str]:
    """The folders of programs that a person runs, for PATH: those that are built."""
    return [str(one.folder) for one in every().values() if one.folder and one.prepared]


def prepare(report: Report, chosen: Iterable[Addon]) -> None:
    """Build or fetch the programs and write the images of add-ons; needs no root. What is there is left alone.

    Raises:
        BuildFailed: Something could not be had.
    """
    chosen = [addon for addon in chosen if not addon.prepared]
    binaries.build(report, [addon.module for addon in chosen if addon.module])
    for addon in chosen:
        if addon.jars:
            with report.alone(settings.cache() / f"{addon.jars.name}.lock"), report.step(f"Fetch the jars of {addon.told['title']}"):
                addon.jars.fetch()
                _write_commands(addon)
        if addon.archive:
            images.once(
                addon.archive,
                f"addon-{addon.name}-*.tar",
                f"Write the images of {addon.told['title']}",
                functools.partial(_write, addon),
                report,
            )


def _write_commands(addon: Addon) -> None:
    """Write a shell script for each command that the add-on names."""
    if addon.folder is None or addon.folder.exists():
        return
    draft = addon.folder.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name, main in addon.told["commands"].items():
        script = draft / name
        run = shlex.join(java(main, jvm=("-Xmx512m",)))
        variables = shlex.join(f"{name}={value}" for name, value in addon.jars.environment.items())
        script.write_text(f'#!/bin/sh\nexec env {variables} {run} "$@"\n')
        script.chmod(0o755)
    draft.rename(addon.folder)


def _write(addon: Addon) -> None:
    with tempfile.TemporaryDirectory(prefix="lab-") as wheel:
        if (pins := addon.source / "wheel.txt").exists() and (failed := binaries.install(pins, Path(wheel))):
            raise BuildFailed(f"A wheel of {addon.told['title']} could not be installed: {failed}", "Check the network, then run it again.")
        places = [*([addon.module.folder] if addon.module else []), Path(wheel)]

        def find(program: str) -> Path:
            own = next((place / program for place in places if (place / program).exists()), None)
            if found := own or shutil.which(program):
                return Path(found)
            raise MissingPrerequisite(f"There is no program {program!r} for the images of {addon.told['title']}.", "Install it.")

        images.write_archive(
            addon.archive,
            [
                images.of_programs(
                    tag, [find(program) for program in told["programs"]], tuple(told.get("entrypoint", ())), told.get("user", "")
                )
                for tag, told in zip(addon.tags, addon.told["images"].values(), strict=True)
            ],
        )
