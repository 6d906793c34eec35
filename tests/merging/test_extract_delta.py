"""Sparse task vectors: the largest changes exactly, read back in any pieces, much smaller than the model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mergelab import operators as ops
from mergelab.checkpoints import TensorSource, open_checkpoint
from mergelab.checkpoints.sparse_delta import with_delta
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, OperatorError
from mergelab.merging import Recipe, extract_delta, merge
from tests.merging.recipes import write_model

SHAPES = {
    "model.layers.0.w": (37, 130),
    "model.layers.0.norm": (9,),
    "model.wide": (3, 70_001),
    "same": (4, 4),
}
Tree = dict[str, np.ndarray]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tree, Tree]:
    """A base and its fine-tune, also written to the working directory; changes come in few magnitudes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    step = {k: rng.integers(-3, 4, s).astype(np.float32) / 64 for k, s in SHAPES.items() if k != "same"}
    tuned = {k: v + step.get(k, np.float32(0)) for k, v in base.items()}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    return base, tuned


def trimmed(base: np.ndarray, tuned: np.ndarray, density: float) -> np.ndarray:
    """The base with the largest changes, ties to the lowest index."""
    delta = (tuned - base).reshape(-1)
    order = np.lexsort((np.arange(delta.size), -np.abs(delta)))[: max(1, int(density * delta.size))]
    kept = np.zeros_like(delta)
    kept[order] = delta[order]
    return base + kept.reshape(base.shape)


def read(source: TensorSource, pieces: list[int]) -> np.ndarray:
    """A tensor read piece by piece, the pieces in reverse."""
    bounds = [0, *pieces, int(np.prod(source.shape))]
    out = np.empty(bounds[-1], np.float32)
    for start, stop in reversed(list(itertools.pairwise(bounds))):
        source.read_into(start, out[start:stop])
    return out.reshape(source.shape)


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_the_largest_changes_are_kept_and_read_back_in_any_pieces(
    pair: tuple[Tree, Tree], density: float
) -> None:
    base, tuned = pair
    made = extract_delta("tuned", "base", "delta", density=density)
    found = with_delta(open_checkpoint("base"), "delta").tensors
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        whole = read(found[name], [])
        np.testing.assert_array_equal(whole, trimmed(base[name], tuned[name], density))
        pieces = sorted({1, size // 3, size // 2 + 1, min(size - 1, 65_536), min(size - 1, 131_075)})
        np.testing.assert_array_equal(read(found[name], pieces), whole)
    assert "same" not in made.kept and sum(made.kept.values()) <= density * made.entries + 1
    if density < 0.2:
        # A bit and a tenth of a float32 of each entry, of four bytes: and the sum of both is the model.
        assert made.nbytes < made.model_bytes * (1 / 32 + density) + 4000
        again = {name: np.asarray(read(source, [])) for name, source in found.items()}
        assert any(np.abs(again[name] - tuned[name]).max() > 0.01 for name in again)


def test_the_engine_reads_it_as_a_model_of_its_base(pair: tuple[Tree, Tree], tmp_path: Path) -> None:
    base, tuned = ({name: tree[name] for name in ("model.layers.0.w", "same")} for tree in pair)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    command = ["extract-delta", "tuned", "--base", "base", "--density", "0.2", "--out", "delta", "--json"]
    run = CliRunner().invoke(cli, command)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["bytes"] == Path("delta/delta.safetensors").stat().st_size
    recipe = Recipe(
        merge_method="task_arithmetic",
        base_model="base",
        models=[{"model": "base+delta", "parameters": {"weight": 0.5}}],
    )
    merge(recipe, "out")
    found = load_file("out/model.safetensors")
    expected = ops.chain(ops.Trim(0.2), ops.WeightedSum(0.5))([tuned], base)
    for name in base:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_what_does_not_fit_is_refused_by_name(pair: tuple[Tree, Tree], tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(OperatorError, match="density is 0 "):
        extract_delta("tuned", "base", "x", density=0)
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract_delta("base", "base", "x", density=0.1)
    write_model(tmp_path / "bad", {**tuned, "same": np.full((4, 4), np.nan, np.float32)})
    with pytest.raises(CheckpointError, match="'same': 16 of 16 differences are NaN"):
        extract_delta("bad", "base", "x", density=0.1)
    assert not Path("x").exists()
    extract_delta("tuned", "base", "delta", density=0.1)
    write_model(tmp_path / "other", {**base, "model.wide": base["model.wide"][:2]})
    with pytest.raises(CheckpointError, match=r"'model.wide' is \[3, 70001\], but \[2, 70001\]"):
        with_delta(open_checkpoint("other"), "delta")
    parts = load_file("delta/delta.safetensors")
    parts["model.wide.mask"] = parts["model.wide.mask"] | np.uint8(1)
    save_file(parts, "delta/delta.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.wide.values' holds 21000 values where"):
        read(with_delta(open_checkpoint("base"), "delta").tensors["model.wide"], [])
