"""Every notebook of colab/ runs from end to end on a CPU, as a reader would run it in an empty folder."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(REPOSITORY.glob("colab/*.ipynb"))
# What each prints once its point is made.
PRINTED = {
    "merging.ipynb": "memory against disk:",
    "models.ipynb": "saved is what was loaded: True",
    "sae.ipynb": "the same SAE in SAELens files: True",
    "sae_evaluation.ipynb": "ablating subtracts what the latent writes: True",
    "steering.ipynb": "alarming prompts refused: 100% -> 0%",
}


def execute(notebook: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs all cells in a kernel of this interpreter; returns what they printed."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_notebook_is_stored_without_outputs_and_can_be_compiled(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for source in cells:
        plain = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
        compile(plain, path.name, "exec")
    assert cells and path.name in PRINTED


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRINTED[path.name] in execute(nbformat.read(path, as_version=4), tmp_path, monkeypatch)


def test_a_failing_cell_would_fail_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = nbformat.v4.new_code_cell("assert 1 + 1 == 3")
    with pytest.raises(CellExecutionError):
        execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path, monkeypatch)
