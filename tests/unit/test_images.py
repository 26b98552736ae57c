import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lab import images, settings
from lab.report import Report


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setenv("LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield images.demo_archive(Report(quiet=True))
    patch.undo()


def layers(archive: Path, tag: str, target: Path) -> dict:
    """Unpack an image as a container runtime would, and return its configuration."""
    with tarfile.open(archive) as file:
        entry = next(one for one in json.load(file.extractfile("manifest.json")) if tag in one["RepoTags"])
        for name in entry["Layers"]:
            with tarfile.open(fileobj=file.extractfile(name)) as layer:
                layer.extractall(target)
        return json.load(file.extractfile(entry["Config"]))


def test_every_folder_is_an_image_and_layers_are_shared(archive: Path) -> None:
    with tarfile.open(archive) as file:
        manifest = json.load(file.extractfile("manifest.json"))
        names = file.getnames()
    assert {entry["RepoTags"][0] for entry in manifest} == set(images.tags())
    assert len({entry["Layers"][0] for entry in manifest}) == 1
    assert len(names) == len(set(names))


def test_the_programs_run_on_what_is_in_the_image_alone(archive: Path, tmp_path: Path) -> None:
    config = layers(archive, images.name("client:v1"), tmp_path)
    assert config["config"]["User"] == images.UNPRIVILEGED
    if not shutil.which("chroot") or subprocess.run(["chroot", str(tmp_path), "/nothing"], capture_output=True).returncode == 125:
        pytest.skip("chroot needs root")
    environment = dict(variable.split("=", 1) for variable in config["config"]["Env"])
    program = "import ssl, sqlite3, http.server, json; print(json.dumps(ssl.OPENSSL_VERSION))"
    done = subprocess.run(
        [shutil.which("chroot"), str(tmp_path), "/usr/local/bin/python3", "-c", program], env=environment, capture_output=True, text=True
    )
    assert "OpenSSL" in done.stdout, done.stderr


def test_the_same_sources_give_the_same_bytes(archive: Path) -> None:
    before = archive.read_bytes()
    archive.unlink()
    assert images.demo_archive(Report(quiet=True)).read_bytes() == before


def test_a_registry_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_IMAGES", "registry.example/class/")
    assert images.name("shop:v1") == "registry.example/class/shop:v1"


def test_a_cache_that_is_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        images.demo_archive(Report(quiet=True))
    assert settings.cache() == tmp_path / "file"
