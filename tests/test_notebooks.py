"""Every notebook of colab/ runs from end to end on a CPU, as a reader would run it in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(REPOSITORY.glob("colab/*.ipynb"))
URLS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
SLUG = URLS["Repository"].removeprefix("https://github.com/")
"""Where the repository is published, in the one place that says so."""
# What each prints once its point is made.
PRINTED = {
    "explain.ipynb": "shuffled documents gain next to nothing: True",
    "merging.ipynb": "memory against disk:",
    "models.ipynb": "saved is what was loaded: True",
    "sae.ipynb": "the same SAE in SAELens files: True",
    "sae_evaluation.ipynb": "ablating subtracts what the latent writes: True",
    "steering.ipynb": "alarming prompts refused: 100% -> 0%",
    "verdict.ipynb": "an unwritten merge measures as the written one: True",
    "test_time.ipynb": "the same call ends in the same results: True",
}


def execute(notebook: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs all cells in a kernel of this interpreter, in place; returns what they printed."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the models of the quickstart, on any machine
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


def code(path: Path, number: int) -> str:
    """The code cell of a notebook with that number."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"][number]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_notebook_begins_as_all_do(path: Path) -> None:
    """A badge, the same installation and parameters, and full float32, which the claims need on a TPU."""
    first = nbformat.read(path, as_version=4).cells[0].source
    place = f"https://colab.research.google.com/github/{SLUG}/blob/main/colab/{path.name}"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})" in first
    assert "fits: yes, " in first
    install, imports, parameters = (code(path, number) for number in range(3))
    assert install == code(NOTEBOOKS[0], 0) and SLUG in install
    named = re.findall(
        r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?=[\"/\s)])", path.read_text("utf-8").replace("\\", "")
    )
    assert named == [SLUG, SLUG], "the badge and the installation, and nothing else"
    assert parameters == code(NOTEBOOKS[0], 2) and "example_models(" in path.read_text("utf-8")
    assert 'jax.config.update("jax_default_matmul_precision", "highest")' in imports
    assert "describe_devices()" in imports


class Pip:
    """Stands for `subprocess.run`: what pip was asked for, and an answer."""

    def __init__(self, returncode: int) -> None:
        self.calls: list[list[str]] = []
        self.returncode = returncode

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        return subprocess.CompletedProcess(command, self.returncode, "ERROR: ResolutionImpossible")


@pytest.mark.parametrize(("missing", "returncode"), [(True, 0), (True, 1), (False, 0)])
def test_the_installation_leaves_the_runtimes_jax_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: bool,
    returncode: int,
) -> None:
    pip = Pip(returncode)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if missing and n == "mergelab" else find(n)
    )
    source = compile(code(NOTEBOOKS[0], 0), "install", "exec")
    if returncode:  # what pip says is shown, and the notebook stops
        with pytest.raises(SystemExit, match="mergelab is not installed"):
            exec(source, {})
        assert "ResolutionImpossible" in capsys.readouterr().out
    else:
        exec(source, {})
    assert len(pip.calls) == missing
    if missing:
        (command,) = pip.calls
        assert command[1:5] == ["-m", "pip", "install", "-q"]
        assert command[5:] == ["-c", "runtime.txt", f"git+https://github.com/{SLUG}"]
        kept = (tmp_path / "runtime.txt").read_text().splitlines()
        assert {f"jax=={version('jax')}", f"jaxlib=={version('jaxlib')}"} <= {*kept}
        assert not any(line.startswith(("mergelab", "numpy", "flax")) for line in kept)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_the_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert PRINTED[path.name] in execute(notebook, tmp_path, monkeypatch)
    if kept := os.environ.get("MERGELAB_NOTEBOOKS"):  # for the site: NOTEBOOKS=DIR bash docs/build.sh
        nbformat.write(notebook, Path(kept) / path.name)
    # And once more where its folder is there, as after a lost runtime.
    assert PRINTED[path.name] in execute(nbformat.read(path, as_version=4), tmp_path, monkeypatch)


def test_a_failing_cell_would_fail_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = nbformat.v4.new_code_cell("assert 1 + 1 == 3")
    with pytest.raises(CellExecutionError):
        execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path, monkeypatch)
