from pathlib import Path

import pytest

from lab import byo, settings
from lab.errors import LabError

CONFIG = """
apiVersion: v1
kind: Config
current-context: other
contexts:
- {name: mine, context: {cluster: one, user: me}}
- {name: other, context: {cluster: two, user: you}}
clusters:
- {name: one, cluster: {server: "https://127.0.0.1:1"}}
- {name: two, cluster: {server: "https://127.0.0.1:2"}}
users:
- {name: me, user: {token: mine-alone}}
- {name: you, user: {token: not-mine}}
"""


@pytest.mark.parametrize(
    ("cluster", "servers", "found"),
    [
        ("", "", settings.Own("", "")),
        ("context:kind-kind", " a:9092, b:9093 ", settings.Own("kind-kind", "a:9092,b:9093")),
        ("context:arn:aws:eks:eu:1:cluster/x", "[::1]:9092", settings.Own("arn:aws:eks:eu:1:cluster/x", "[::1]:9092")),
    ],
)
def test_what_the_environment_names(monkeypatch: pytest.MonkeyPatch, cluster: str, servers: str, found: settings.Own) -> None:
    monkeypatch.setenv("LAB_CLUSTER", cluster)
    monkeypatch.setenv("LAB_BROKERS", servers)
    assert settings.own() == found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LAB_CLUSTER", "kind"),
        ("LAB_CLUSTER", "context:"),
        ("LAB_BROKERS", "host"),
        ("LAB_BROKERS", ":1"),
        ("LAB_BROKERS", "a:0"),
        ("LAB_BROKERS", "a:99999"),
        ("LAB_BROKERS", "a:b"),
    ],
)
def test_what_is_not_understood_is_said(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LabError, match=name):
        settings.own()


def test_a_context_is_cut_out_of_a_kubeconfig_with_no_other_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(CONFIG)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    path = byo.kubeconfig("mine")
    assert "mine-alone" in path.read_text()
    assert "not-mine" not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_lab_is_found_again_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SYSTEM_STATE", tmp_path)
    assert settings.find() is None or settings.find().state != str(tmp_path)
    lab = settings.Lab("/a/b c", str(tmp_path), "/cache", subnet="10.30.0.0/24", nodes=["node-1"])
    lab.save()
    assert settings.find() == lab
    (tmp_path / "lab.json").write_text("{")
    assert settings.find() is None or settings.find().state != str(tmp_path)
