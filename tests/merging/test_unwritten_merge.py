"""A merge that is never written: its tensors, read in any pieces, are those of the written one."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergelab.checkpoints import TensorSource, open_checkpoint, read_whole
from mergelab.errors import CheckpointError, NonFiniteError, RecipeError
from mergelab.merging import merge, open_merge, parse_recipe, plan_merge
from mergelab.merging.engine import blocks, on_demand
from tests.merging.recipes import write_model
from tests.merging.test_stages import THREE
from tests.merging.vocabulary.conftest import tokenizer_json

TASK = "base_model: base\nmodels: [{model: a}, {model: b}]\n"
RECIPES = {
    "linear": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n",
    "ranks": f"merge_method: ties\n{TASK}parameters: {{density: 0.4, weight: 1}}\ndtype: bfloat16\n",
    "random": f"merge_method: dare_ties\n{TASK}parameters: {{density: 0.5, weight: 0.5}}\n",
    "whole tensors": f"merge_method: iso_c\n{TASK}",
    "a tree": f"merge_method: ties\n{TASK}parameters: {{density: 0.4, weight: 1, scope: tree}}\n",
    "stages": THREE,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unwritten")
    for seed, name in enumerate(["base", "a", "b"]):
        write_model(folder / name, seed=seed, width=24, rows=40)
        tokens = tokenizer_json("BPE", [*"uvwxyz"], {})
        (folder / name / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def in_pieces(tensors: Mapping[str, TensorSource], size: int) -> dict[str, np.ndarray]:
    """All tensors, each read by several threads in pieces of so many elements."""
    found = {}
    with ThreadPoolExecutor(3) as pool:
        for name, source in tensors.items():
            flat = np.empty(int(np.prod(source.shape)), source.dtype)
            starts = range(0, flat.size, size)
            list(
                pool.map(lambda s, flat=flat, source=source: source.read_into(s, flat[s : s + size]), starts)
            )
            found[name] = flat.reshape(source.shape)
    return found


@pytest.mark.parametrize("kind", RECIPES)
def test_pieces_are_those_of_the_written_merge(
    models: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(blocks, "LANES", 16)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 16)
    options: dict[str, Any] = {"base_dir": models, "seed": 3}
    written = merge(parse_recipe(RECIPES[kind]), tmp_path / "out", **options)
    opened = open_merge(parse_recipe(RECIPES[kind]), threads=2, **options)
    expected = open_checkpoint(written.out)
    assert opened.plan.identity == written.plan.identity == opened.fingerprint()
    assert list(opened.tensors) == list(written.plan.jobs[i].name for i in range(len(opened.tensors)))
    for name, array in in_pieces(opened.tensors, 100).items():
        right = read_whole(expected.tensors[name])
        assert array.dtype == right.dtype and array.tobytes() == right.tobytes(), name
    assert opened.config == expected.config
    small = {file.name for file in opened.path.iterdir()}
    assert small == {"config.json", "tokenizer.json"}
    assert all((opened.path / name).read_bytes() == (written.out / name).read_bytes() for name in small)


def test_each_block_is_merged_once_where_tensors_are_read_in_order(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(blocks, "LANES", 16)
    made: list[tuple[str, int]] = []
    reading, lock = on_demand.TensorRun.read, threading.Lock()

    def counted(self: Any, block: Any) -> np.ndarray:
        with lock:
            made.append((self.job.name, block.start))
        return reading(self, block)

    monkeypatch.setattr(on_demand.TensorRun, "read", counted)
    opened = open_merge(parse_recipe(RECIPES["linear"]), base_dir=models, threads=2)
    assert not made, "nothing is merged before it is read"
    in_pieces(opened.tensors, 100)
    assert len(made) == len(set(made)) > len(opened.tensors)


def test_what_was_read_is_forgotten(models: Path) -> None:
    latest: on_demand._Latest[int] = on_demand._Latest(room=10)
    made: list[int] = []
    for key in (1, 2, 1, 3, 4, 1):
        latest.get(key, 5, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 4, 1]
    with pytest.raises(ZeroDivisionError):
        latest.get(5, 1, lambda: 1 // 0)
    assert latest.get(5, 1, lambda: 7) == 7, "a failure is not kept"


def test_faults_are_those_of_a_merge(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'nobody' does not exist"):
        open_merge(parse_recipe(RECIPES["linear"].replace("model: b", "model: nobody")), base_dir=models)
    plan = plan_merge(parse_recipe(RECIPES["linear"]), base_dir=models)
    with pytest.raises(RecipeError, match="the plan was made before seed could be heeded"):
        open_merge(plan, seed=1)
    bad = {name: read_whole(source) for name, source in open_checkpoint(models / "a").tensors.items()}
    bad["model.norm.weight"][3] = np.nan
    write_model(tmp_path / "a", bad)
    recipe = parse_recipe(RECIPES["linear"].replace("model: a", f"model: {tmp_path / 'a'}"))
    opened = open_merge(recipe, base_dir=models)
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' of .* holds 1 NaN"):
        read_whole(opened.tensors["model.norm.weight"])


def test_a_reader_of_models_alone_says_what_a_recipe_is(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPES["linear"])
    with pytest.raises(CheckpointError, match=r"r\.yaml is a recipe by its name.*mergelab\.load_model"):
        open_checkpoint(tmp_path / "r.yaml")


def test_the_folder_of_small_files_ends_with_the_merge(models: Path) -> None:
    opened = open_merge(parse_recipe(RECIPES["linear"]), base_dir=models)
    folder = opened.path
    assert (folder / "tokenizer.json").is_file()
    del opened
    assert not folder.exists()
