"""Two real processes with four devices each: each reads and writes its share, and they fail together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.folder import open_checkpoint
from mergelab.models.load import load_model
from mergelab.models.table import stored_shapes
from tests.models.distributed_worker import WIDE
from tests.models.tiny_models import weights, write
from tests.two_processes import run_two


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes worked in, and what each of them reported."""
    folder = tmp_path_factory.mktemp("distributed")
    rng = np.random.default_rng(0)
    (folder / "wide").mkdir()
    wide = {n: rng.normal(size=shape).astype(np.float32) for n, shape in stored_shapes(WIDE).items()}
    save_file(wide, folder / "wide" / "model.safetensors")
    write(folder / "model", "llama")
    return folder, run_two("tests.models.distributed_worker", folder)


def test_each_process_reads_its_half(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, reports = run
    everything = sum(a.nbytes for a in load_file(folder / "wide" / "model.safetensors").values())
    assert [report["bytes read"] for report in reports] == [everything // 2, everything // 2]
    for name in ("kernel", "down", "embed", "experts"):
        assert not set(reports[0]["shards"][name]) & set(reports[1]["shards"][name])


def test_together_they_write_what_was_read(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, reports = run
    wide, out = load_file(folder / "wide" / "model.safetensors"), open_checkpoint(folder / "wide-out")
    assert len(out.files) > 1 and out.tensors.keys() == wide.keys()
    for file in out.files:
        for name, array in load_file(file.file.path).items():
            assert array.tobytes() == wide[name].tobytes()
    model, _ = load_model(folder / "model")
    for written in ("model-out", "orbax-out"):
        found = load_file(folder / written / "model.safetensors")
        expected = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights(model).items()}
        assert found.keys() == expected.keys()
        assert all(found[n].tobytes() == a.tobytes() for n, a in expected.items())
    assert json.loads((folder / "model-out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert all(report["merge stays"] for report in reports)


def test_they_compute_what_one_process_computes(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, reports = run
    model, params = load_model(folder / "model", dtype="bfloat16")
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    logits = jax.jit(lambda p: model.apply(p, tokens).logits)(params)
    assert logits is not None
    spread = float(jnp.abs(logits.astype(jnp.float32)).sum())
    here = float(logits.astype(jnp.float32).sum())
    assert reports[0]["logits"] == reports[1]["logits"] == pytest.approx(here, abs=0.02 * spread)


def test_one_process_failing_fails_both_and_leaves_nothing(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = run
    assert second["load"] == "CheckpointError: the disk of this process is broken"
    assert first["load"].startswith("MeshError: loading the model failed in process 1 of 2: CheckpointError")
    assert second["save"] == "OutputError: the disk of this process is full"
    assert first["save"].startswith("MeshError: saving the model failed in process 1 of 2: OutputError")
    assert first["occupied"].startswith("OutputError") and "not empty" in first["occupied"]
    assert second["occupied"].startswith("MeshError: preparing the output failed in process 0 of 2")
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".") or p.name == "failed"]
