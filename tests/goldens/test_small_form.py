"""The goldens of the repository: models made again, and outputs small enough to keep that still judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergelab.merging import merge
from tests.goldens.recording import STEP, digest, load, read, small


def test_the_models_are_those_that_mergekit_merged(small_goldens: Path) -> None:
    recorded = json.loads((small_goldens / "outputs.json").read_text())["models"]
    made = {
        folder.name: digest({k: v for file in folder.glob("*.safetensors") for k, v in load(file).items()})
        for folder in (small_goldens / "models").iterdir()
    }
    assert made == recorded and len(set(made.values())) == len(made) == 20


@pytest.mark.parametrize("exact", [True, False])
def test_one_wrong_entry_between_the_kept_ones_is_found(tmp_path: Path, exact: bool) -> None:
    value = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    index, arrays = small({"case": {"w": value}}, {"case"} if exact else set())
    (tmp_path / "recipes" / "case").mkdir(parents=True)
    (tmp_path / "outputs.json").write_text(json.dumps(index))
    np.savez_compressed(tmp_path / "outputs.npz", **arrays)
    recording = read(tmp_path, "case")
    assert recording.is_equal({"w": value}) and recording.sums_differ_by({"w": value}) < 1e-7
    wrong = value.copy()
    wrong.ravel()[10 * STEP + 5] += 1e-3
    assert all(np.array_equal(a, b) for a, b in recording.pairs({"w": wrong})), "it is not among those kept"
    if exact:
        assert not recording.is_equal({"w": wrong})
    else:
        assert recording.sums_differ_by({"w": wrong}) > 1e-5
    with pytest.raises(AssertionError):
        recording.pairs({"w": value.astype(np.float64)})


@pytest.mark.parametrize(("case", "exact"), [("ties_nonuniform", True), ("karcher_default", False)])
def test_merges_are_judged_by_the_small_form(
    small_goldens: Path, tmp_path: Path, case: str, exact: bool
) -> None:
    merge(small_goldens / "recipes" / case / "config.yaml", tmp_path / "out", base_dir=small_goldens)
    found, recording = load(tmp_path / "out" / "model.safetensors"), read(small_goldens, case)
    assert recording.is_equal(found) or not exact
    assert max(np.abs(a - b).max() for a, b in recording.pairs(found)) <= 5e-7
    assert recording.sums_differ_by(found) <= 5e-7
    other = {name: value[::-1] for name, value in found.items()}
    assert not recording.is_equal(other) and (exact or recording.sums_differ_by(other) > 1e-3)


def test_a_clone_stays_small(repository: Path) -> None:
    files = [file for file in (repository / "tests" / "goldens").rglob("*") if file.suffix != ".pyc"]
    assert 1_000_000 < sum(file.stat().st_size for file in files if file.is_file()) < 2_000_000
