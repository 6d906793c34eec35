"""A model streamed from its files: memory, readers of rows, meshes, quantized files, and what it refuses."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergelab as ml
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import CheckpointError, MergelabError, SiteError
from mergelab.models.streamed import StreamedParams
from mergelab.models.weights_by_part import HeldWeights, next_blocks
from mergelab.sharding import make_mesh
from tests.models.tiny_models import MASK, TOKENS, write

SITES = ("embed", "blocks.0.attn.z", "blocks.1.resid_post")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    model, params = ml.load_model(folder)
    return ml.capture(model, params, TOKENS, SITES, mask=MASK)


def near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert list(found) == list(expected)
    for site, values in expected.items():
        np.testing.assert_allclose(found[site], values, rtol=0, atol=tolerance * np.abs(values).max())


def test_capture_takes_streamed_parameters(folder: Path, expected: dict[str, np.ndarray]) -> None:
    model, params = ml.stream(folder)
    near(ml.capture(model, params, TOKENS, SITES, mask=MASK), expected)
    # Other batches, the last of which is filled up.
    near(ml.capture(model, params, TOKENS, SITES, mask=MASK, batch=2), expected, 2e-6)
    with pytest.raises(AssertionError):
        near(ml.capture(model, params, TOKENS[::-1], SITES, mask=MASK[::-1]), expected, 1e-2)


def test_rows_are_read_once_for_all_tokens_and_again_where_memory_is_short(
    folder: Path, tmp_path: Path
) -> None:
    model, loaded = ml.load_model(folder)
    tokens = np.tile(TOKENS, (3, 1))
    rows = ModelActivations(model, loaded, tokens, SITES, batch=2).read_sites(0, tokens.size)
    _, streamed = ml.stream(folder, spill=tmp_path)
    reads: list[str] = []
    part = streamed.weights.part
    streamed.weights.part = lambda name: reads.append(name) or part(name)  # pyright: ignore[reportAttributeAccessIssue]
    source = ModelActivations(model, streamed, tokens, SITES, batch=2)
    assert source.widths == (24, 24, 24)
    for start, stop in ((0, tokens.size), (3, 57), (80, 90), (19, 21)):
        for found, row in zip(source.read_sites(start, stop), rows, strict=True):
            np.testing.assert_allclose(found, row[start:stop], rtol=0, atol=1e-6 * np.abs(row).max())
    assert reads == ["blocks_0", "blocks_1"]  # and of the embedding the rows of these tokens
    assert not list(tmp_path.iterdir())  # the file of what waits has no name
    # Held in memory, with room for one batch at a time.
    _, short = ml.stream(folder)
    short.memory = 1
    source = ModelActivations(model, short, tokens, SITES, batch=2)
    for found, row in zip(source.read_sites(15, 75), rows, strict=True):
        np.testing.assert_allclose(found, row[15:75], rtol=0, atol=1e-6 * np.abs(row).max())


class Counted(HeldWeights):
    """Parts that say how many of them are alive."""

    def __init__(self, names: list[str]) -> None:
        super().__init__({name: {} for name in names})
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.made = threading.Semaphore(0)

    def part(self, name: str) -> Any:
        class Block:
            pass

        block = Block()
        self.alive.add(block)
        self.made.release()
        return block


def test_two_blocks_are_held_at_most() -> None:
    weights = Counted([f"blocks_{i}" for i in range(6)])
    with next_blocks(weights, range(6)) as take:
        for number in range(6):
            block = take()
            # The next one is made while this one is used, and none after it.
            for _ in range(2 if number == 0 else 1 if number < 5 else 0):
                assert weights.made.acquire(timeout=10)
            assert not weights.made.acquire(timeout=0.02)
            assert len(weights.alive) == (2 if number < 5 else 1)
            del block


def test_a_mesh_holds_blocks_in_slices(folder: Path, expected: dict[str, np.ndarray]) -> None:
    mesh = make_mesh({"data": 2, "tensor": 2, "fsdp": 2})
    model, params = ml.stream(folder, mesh=mesh)
    kernel = params["blocks_1"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.size < kernel.size
    tokens, mask = np.concatenate([TOKENS, TOKENS[:1]]), np.concatenate([MASK, MASK[:1]])
    found = ml.capture(model, params, tokens, SITES, mask=mask)
    near({site: values[:3] for site, values in found.items()}, expected, 1e-5)


def test_a_recipe_is_streamed_without_being_written(folder: Path, tmp_path: Path) -> None:
    recipe, other = tmp_path / "merge.yaml", write(tmp_path / "other", "llama")
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {folder}, parameters: {{weight: 0.25}}}}\n"
        f"  - {{model: {other}, parameters: {{weight: 0.5}}}}\nparameters: {{normalize: false}}\n"
        "dtype: float32\n"
    )
    loaded, streamed = ml.load_model(recipe), ml.stream(recipe)
    near(ml.capture(*streamed, TOKENS, SITES), ml.capture(*loaded, TOKENS, SITES))


def test_losses_and_tops_are_those_in_memory(folder: Path) -> None:
    from mergelab.activations.losses import summed_loss, target_scores

    loaded, streamed = ml.load_model(folder), ml.stream(folder)
    counted = np.ones((3, 9), bool)
    counted[1, :4] = False
    edit = {"blocks.0.resid_post": jax.tree_util.Partial(jnp.multiply, jnp.float32(0.5))}
    assert summed_loss(*streamed, TOKENS, counted, edit=edit, batch=2) == pytest.approx(
        summed_loss(*loaded, TOKENS, counted, edit=edit, batch=2), rel=1e-6
    )
    for found, known in zip(
        target_scores(*streamed, TOKENS, counted, batch=2),
        target_scores(*loaded, TOKENS, counted, batch=2),
        strict=True,
    ):
        np.testing.assert_allclose(found, known, rtol=1e-5)


def test_what_cannot_be_streamed_says_so(folder: Path, tmp_path: Path) -> None:
    model, params = ml.stream(folder)
    assert set(params) == {"embed", "blocks_0", "blocks_1", "final_norm", "unembed"}
    assert "blocks_1" in params
    assert "blocks_2" not in params
    with pytest.raises(KeyError):
        params["blocks_2"]
    for whole in (
        lambda: jax.tree.map(jnp.asarray, params),
        lambda: jax.jit(model.apply)(params, jnp.asarray(TOKENS)),
    ):
        with pytest.raises(MergelabError, match="streamed from their files"):
            whole()
    with pytest.raises(MergelabError, match="keeps no cache"):
        model.apply(params, jnp.asarray(TOKENS), cache=model.new_cache(3, 10))
    with pytest.raises(SiteError, match="no site of this model matches"):
        model.apply(params, jnp.asarray(TOKENS), capture="blocks.7.resid_post")
    with pytest.raises(MergelabError, match="cannot be kept"):
        ml.capture(*ml.stream(folder, spill=tmp_path / "missing"), TOKENS, SITES)
    weights = folder.parent / "damaged"
    write(weights, "llama")
    data = (weights / "model.safetensors").read_bytes()
    model, params = ml.stream(weights)
    (weights / "model.safetensors").write_bytes(data[:-4000])
    with pytest.raises(CheckpointError):
        ml.capture(model, params, TOKENS, SITES)


def test_held_parameters_run_by_the_same_programs(folder: Path) -> None:
    model, loaded = ml.load_model(folder)
    held = StreamedParams(model, HeldWeights(loaded))
    for site, values in ml.capture(model, held, TOKENS, SITES).items():
        assert np.array_equal(values, ml.capture(*ml.stream(folder), TOKENS, site)[site])
