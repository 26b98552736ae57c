"""What every notebook must be, whether or not it can run here."""

from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("[!.]*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    content = nbformat.read(request.param, as_version=4)
    nbformat.validate(content)
    return content


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_says_what_it_needs(notebook: nbformat.NotebookNode) -> None:
    assert set(notebook.metadata.lab.needs) <= {"cluster", "brokers"}


def test_says_where_its_outputs_come_from(notebook: nbformat.NotebookNode) -> None:
    run = notebook.metadata.lab.run
    assert run.seconds > 0
    assert run.date
    assert run.machine


def test_outputs_are_of_one_run_from_top_to_bottom(notebook: nbformat.NotebookNode) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_but_those_announced(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        raised = any(output.output_type == "error" for output in cell.outputs)
        assert raised == ("raises-exception" in cell.metadata.get("tags", [])), cell.source


def test_pictures_have_alternative_text(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), f"metadata mystnb.image.alt is missing:\n{cell.source}"


def test_every_notebook_is_in_the_book() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {chapter["file"] for part in toc["parts"] for chapter in part["chapters"]}
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in NOTEBOOKS} == {name for name in listed if name.startswith("notebooks/")}


def test_every_notebook_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [str(path.relative_to(ROOT)) for path in NOTEBOOKS if f"({path.relative_to(ROOT)})" not in readme] == []
