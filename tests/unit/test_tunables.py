"""The kernel settings that kubelets change are put back once, by whichever lab goes last."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import host, lifecycle


def test_the_last_of_two_labs_puts_back_what_the_first_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = {"vm/panic_on_oom": "1"}
    monkeypatch.setattr(host, "tunables", lambda: dict(kernel))
    monkeypatch.setattr(host, "restore_tunables", kernel.update)
    one, two = tmp_path / "by-experiment", tmp_path / "by-experiment2"
    one.mkdir()
    two.mkdir()
    lifecycle._save_tunables(one)
    kernel["vm/panic_on_oom"] = "0"  # A kubelet's doing.
    lifecycle._save_tunables(two)
    lifecycle._restore_tunables(one)
    assert kernel == {"vm/panic_on_oom": "0"}
    lifecycle._restore_tunables(two)
    assert kernel == {"vm/panic_on_oom": "1"}
    assert not [path for folder in (one, two) for path in folder.iterdir()]
