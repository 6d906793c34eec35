"""Three processes read and write together: what one alone would, and each byte and row about once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.activations import open_activation_files, store
from mergelab.activations.model_activations import ModelActivations, open_model_activations
from mergelab.activations.store import write_store
from mergelab.models.table import stored_shapes
from mergelab.quickstart import small_llama
from mergelab.quickstart.family import train_bpe
from mergelab.sae.training import train
from tests.models.synthetic import write as write_table
from tests.pods_reading_worker import (
    BUFFER,
    MESHES,
    NARROW,
    PROCESSES,
    ROWS,
    SHARD_ROWS,
    SITES,
    config,
    text_config,
)
from tests.two_processes import run_together

pytestmark = pytest.mark.slow

TEXT = "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, 1))\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("pods"))


def prepared(path: Path) -> Path:
    """A folder with all that the processes read."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, 8)).astype(np.float32)
    rows[:, 0] = np.arange(ROWS) / ROWS  # the planted number of each row
    np.save(path / "rows.npy", rows)
    (path / "narrow").mkdir()
    narrow = {n: rng.normal(size=shape).astype(np.float32) for n, shape in stored_shapes(NARROW).items()}
    save_file(narrow, path / "narrow" / "model.safetensors")
    write_table(path / "table")
    model = small_llama.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    tokenizer = train_bpe([TEXT], 300).to_str().encode()
    small_llama.save(small_llama.init(model, 0), model, path / "model", files={"tokenizer.json": tokenizer})
    (path / "text.txt").write_text(TEXT)
    (path / "other.txt").write_text(TEXT.replace("add", "sub"))
    return path


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """What each process reported."""
    return run_together("tests.pods_reading_worker", folder, PROCESSES)


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelActivations:
    return open_model_activations(folder / "model", SITES, [folder / "text.txt"], length=16)


@pytest.mark.parametrize("name", [*MESHES, "resumed"])
def test_any_number_of_processes_trains_what_one_trains(
    folder: Path, reports: list[Any], tmp_path: Path, name: str
) -> None:
    train(config(folder, None), tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "final" / "sae.safetensors")
    found = load_file(folder / name / "final" / "sae.safetensors")
    for tensor, value in alone.items():
        # Sums run in another order: float tolerance after 30 steps of Adam.
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", MESHES)
def test_a_row_is_read_by_one_process_and_handed_on(reports: list[Any], name: str) -> None:
    read = [report["trainings"][name] for report in reports]
    # The training is an epoch, of which the start sample is; a batch made ahead begins another.
    assert ROWS <= sum(read) <= ROWS + BUFFER
    assert max(read) <= (ROWS + BUFFER) / PROCESSES * 1.05


def test_a_resumed_run_reads_no_sample_and_nothing_that_came_before(reports: list[Any]) -> None:
    read = sum(report["trainings"]["resumed"] for report in reports)
    assert 0 < read <= ROWS - 20 * 96 + 2 * BUFFER < 2 * ROWS


@pytest.mark.parametrize("name", ["text-alone", "text-together"])
def test_a_run_on_text_goes_on_with_other_processes(folder: Path, reports: list[Any], name: str) -> None:
    if name == "text-alone":
        train(text_config(folder, None), folder / name, resume=True)
    whole = load_file(folder / "text" / "final" / "sae.safetensors")
    found = load_file(folder / name / "final" / "sae.safetensors")
    for tensor, value in whole.items():
        # The model's products are split otherwise, too.
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=1e-4)


def test_each_process_computes_its_share_of_the_text(reports: list[Any], source: ModelActivations) -> None:
    read = [report["texts"]["rows"] for report in reports]
    # What is trained on, a start sample of it and what is made ahead: of a text that is longer.
    assert 24 * 20 < sum(read) < source.rows
    assert max(read) <= 1.2 * sum(read) / PROCESSES
    assert all("data.model_mesh has an axis 'rows'" in report["texts"]["axis"] for report in reports)


def test_columns_are_read_by_rows_and_handed_on(reports: list[Any]) -> None:
    for report in reports:
        loading = report["loading"]
        assert loading["same"] and loading["every transform"]
        assert loading["read"] <= 1.5 * loading["kept"]
    failed = [report["loading"]["broken"] for report in reports]
    assert failed[1] == "CheckpointError: the disk of this process is broken"
    assert all(one.startswith("MeshError: loading the model failed in process 1 of 3") for one in failed[::2])


def test_a_store_of_many_processes_is_that_of_one(
    folder: Path, reports: list[Any], source: ModelActivations, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(store, "_SHARD_ROWS", SHARD_ROWS)
    write_store(source, tmp_path / "acts", model=folder / "model")
    alone = {path.name: path.read_bytes() for path in (tmp_path / "acts").iterdir()}
    together = {path.name: path.read_bytes() for path in (folder / "acts").iterdir()}
    assert together.keys() == alone.keys() and len(alone) > 3 * PROCESSES
    assert [name for name in alone if together[name] != alone[name]] == []
    assert {report["stores"]["rows"] for report in reports} == {source.rows}
    one_site = open_activation_files(folder / "acts" / f"{SITES[0]}-*.safetensors")
    np.testing.assert_array_equal(one_site.read(0, source.rows), source.read_sites(0, source.rows)[0])
    for report in reports:
        assert "have read different text" in report["stores"]["unlike"]
    left = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "unlike"]
    assert left == []


def test_a_killed_store_goes_on_with_another_number_of_processes(
    folder: Path, reports: list[Any], source: ModelActivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run_together("tests.pods_reading_worker", folder, PROCESSES, "killed", codes=None)
    assert ended == [] and not (folder / "killed").exists()
    work = folder / ".killed.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("*-*.safetensors")}
    assert len(kept) >= 2 * PROCESSES
    receipts = [folder / ".killed.journal", *work.glob(".receipts-*")]
    noted = {json.loads(line)["file"] for path in receipts for line in path.read_text().split("\n") if line}
    monkeypatch.setattr(store, "_SHARD_ROWS", SHARD_ROWS)
    write_store(source, folder / "killed", model=folder / "model")  # alone
    assert noted
    for name in noted:
        assert (folder / "killed" / name).stat().st_mtime_ns == kept[name]  # not written again
    for path in (folder / "acts").iterdir():
        assert (folder / "killed" / path.name).read_bytes() == path.read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".killed")]
