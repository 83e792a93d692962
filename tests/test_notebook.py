"""The notebook runs from top to bottom as a newcomer would run it."""

import os
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient

import hpsearch

NOTEBOOK = Path(__file__).parent.parent / "studies" / "tour.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.reads(NOTEBOOK.read_text(), as_version=4)  # type: ignore[no-untyped-call,no-any-return]


def test_every_cell_of_the_notebook_runs_and_shows_what_it_promises(
    notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # whose list of fonts takes seconds to make
    before = {file.name for file in NOTEBOOK.parent.iterdir()}
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "test accuracy 9" in printed
    assert "winner: trial" in printed
    assert re.search(r"(0\.9\d|1\.00) of the validation images are right", printed)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert {file.name for file in NOTEBOOK.parent.iterdir()} == before, "it leaves files beside the studies"


def test_the_notebook_is_committed_without_outputs(notebook: nbformat.NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells] == [[] for _ in cells]
    assert {cell.execution_count for cell in cells} == {None}


def test_the_notebook_uses_public_names_alone(notebook: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert set(re.findall(r"hpsearch\.(\w+)", text)) <= {*hpsearch.__all__}
    assert not re.search(r"from hpsearch|import hpsearch\.", text)
