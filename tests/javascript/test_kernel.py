"""The JavaScript kernel: outputs in their place, and errors that nobody can miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from lab.javascript import MARK, SHOWN, Kernel

ROOT = Path(__file__).parents[2]
KERNEL = {"name": "deno", "display_name": "Deno", "language": "typescript"}
FAILING = {
    "thrown": ('throw new TypeError("broken")', "broken"),
    "awaited": ('await Promise.reject(new RangeError("too late"))', "too late"),
    "not-compiled": ("const = 1", "SyntaxError"),
    "missing": ("nowhere()", "nowhere is not defined"),
}


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, execution_count=count) for count, source in enumerate(sources, 1)]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "lab": {"needs": []}})


def run(*arguments: str | Path, cwd: Path, how: str = "-m") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
    return subprocess.run([sys.executable, how, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_no_output_is_lost_or_misplaced() -> None:
    content = notebook(*(f'console.log("a{count}"); console.log("b{count}"); {count}' for count in range(80)))
    NotebookClient(content, kernel_name="deno", timeout=120).execute()
    for count, cell in enumerate(content.cells):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        values = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
        assert (printed, values) == (f"a{count}\nb{count}\n", [str(count)])


def test_a_late_value_is_not_taken_for_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deno gave a value to the mark's cell in 1 of 1,000 cells on a busy machine."""
    sent: list[Any] = []
    kernel = Kernel.__new__(Kernel)
    kernel.session = SimpleNamespace(send=lambda socket, kind, content, **more: sent.append((kind, content.get("data"))))
    kernel.request, kernel.published, kernel.mark, kernel.reply = {"msg_id": "cell"}, None, "mark", {"status": "ok"}
    kernel.missing = {"stream", "execute_result", "status"}
    released: list[bool] = []
    monkeypatch.setattr(kernel, "release", lambda: released.append(True))
    kernel.marked("stream", {"text": f"late\n{MARK}\n"}, idle=False)
    kernel.marked("execute_result", {"data": {"text/plain": "42"}}, idle=False)
    kernel.marked("status", {}, idle=True)
    assert not released
    kernel.marked("execute_result", {"data": {"text/plain": SHOWN}}, idle=False)
    assert released
    assert sent == [("stream", None), ("execute_result", {"text/plain": "42"})]


def test_a_console_of_ones_own_does_not_hang() -> None:
    content = notebook("const kept = console.log; console.log = () => {}; 1", "console.log = kept; 2")
    NotebookClient(content, kernel_name="deno", timeout=120).execute()
    assert [cell.outputs[-1].data["text/plain"] for cell in content.cells] == ["1", "2"]


@pytest.mark.parametrize("name", FAILING)
def test_an_error_fails_nbval(name: str, tmp_path: Path) -> None:
    source, said = FAILING[name]
    path = tmp_path / f"{name}.ipynb"
    nbformat.write(notebook("const fine = 1;", source), path)
    done = run("pytest", "--nbval", "-p", "no:cacheprovider", "--rootdir", tmp_path, path, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert said in done.stdout


def test_another_output_fails_nbval(tmp_path: Path) -> None:
    content = notebook('console.log("now")')
    content.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="then\n")]
    nbformat.write(content, tmp_path / "other.ipynb")
    done = run("pytest", "--nbval", "-p", "no:cacheprovider", "--rootdir", tmp_path, "other.ipynb", cwd=tmp_path)
    assert "1 failed" in done.stdout


def test_an_error_fails_store_and_stores_nothing(tmp_path: Path) -> None:
    path = tmp_path / "thrown.ipynb"
    nbformat.write(notebook(FAILING["thrown"][0]), path)
    before = path.read_bytes()
    done = run("lab.book", "store", path, cwd=ROOT)
    assert done.returncode != 0
    assert "TypeError" in done.stdout + done.stderr
    assert path.read_bytes() == before


def test_an_error_fails_the_book(tmp_path: Path) -> None:
    configuration = {"title": "One notebook", "execute": yaml.safe_load((ROOT / "_config.yml").read_text())["execute"]}
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(configuration))
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: lesson\n")
    content = notebook(FAILING["thrown"][0])
    content.cells.insert(0, nbformat.v4.new_markdown_cell("# A lesson"))
    nbformat.write(content, tmp_path / "lesson.ipynb")
    program = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    done = run(program, "build", "--warningiserror", "--keep-going", tmp_path, cwd=tmp_path, how="-c")
    assert done.returncode != 0
    assert "Executing notebook failed" in done.stderr
    assert "TypeError: broken" in (tmp_path / "_build/html/reports/lesson.err.log").read_text()
