"""Exact selection: the k largest by groups, across shards, and by counts, against `lax.top_k` and numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from mergelab.sae.kernels import largest as searching
from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.largest import kth_largest, largest, pre_activations, search, top_k
from mergelab.sharding import make_mesh


def _rows(seed: int, tokens: int, n: int, distinct: int) -> np.ndarray:
    """Rows with many ties: values from a few levels."""
    levels = np.random.default_rng(seed).integers(-distinct, distinct, (tokens, n))
    return levels.astype(np.float32) / 7


@given(seed=st.integers(0, 10**6), distinct=st.sampled_from([1, 2, 5, 1000, 10**6]))
def test_groups_give_what_top_k_gives_ties_included(seed: int, distinct: int) -> None:
    x = _rows(seed, 5, 1024, distinct)
    values, indices = top_k(jnp.asarray(x), 8)
    wanted_values, wanted_indices = lax.top_k(jnp.asarray(x), 8)
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(indices, wanted_indices)


@pytest.mark.parametrize(("n", "k"), [(1000, 8), (64, 64), (2048, 3), (4096, 64)])
def test_any_shape(n: int, k: int) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, n), np.float32))
    values, indices = jax.jit(top_k, static_argnums=1)(x, k)
    np.testing.assert_array_equal(values, lax.top_k(x, k)[0])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(x), np.asarray(indices), 1), values)


@pytest.mark.parametrize("distinct", [1, 3, 10**6])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_shards_keep_exactly_the_elements_of_the_whole_row(k: int, distinct: int) -> None:
    x = _rows(k, 6, 128, distinct)
    if k == 5:  # one shard owns them all: nothing may be lost to a capacity
        x[:, 32:48] += 10**7
    mesh = make_mesh({"latents": 8})
    shards = Shards(latents="latents")

    def mask(part: jax.Array) -> jax.Array:
        best = largest(*top_k(part, min(k, part.shape[1])), k, shards)
        rows = jnp.arange(part.shape[0])[:, None]
        return jnp.zeros(part.shape, bool).at[rows, best.indices].set(best.among(k))

    spec = PartitionSpec(None, "latents")
    kept = jax.jit(jax.shard_map(mask, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(x)
    wanted = np.zeros(x.shape, bool)
    np.put_along_axis(wanted, np.asarray(lax.top_k(jnp.asarray(x), k)[1]), True, axis=1)
    np.testing.assert_array_equal(kept, wanted)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 60), distinct=st.sampled_from([2, 50, 10**6]))
def test_counts_find_the_kth_largest(seed: int, k: int, distinct: int) -> None:
    x = np.abs(_rows(seed, 4, 50, distinct))
    found = kth_largest(jnp.asarray(x), k, lambda f: f.sum(axis=1, dtype=jnp.int32, keepdims=True))
    wanted = np.sort(x, axis=1)[:, ::-1][:, k - 1 : k] if k <= 50 else np.zeros((4, 1))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 12, 37])
def test_a_search_in_pieces_finds_what_the_whole_has(
    rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(rows)
    x, encoder = (jnp.asarray(draw.integers(-3, 4, shape), jnp.float32) for shape in ((37, 16), (640, 16)))
    bias = jnp.asarray(draw.integers(-9, 10, 640), jnp.float32)
    # Of such whole numbers every product is exact, in half precision too, and many are equal.
    values, indices = lax.top_k(pre_activations(x, encoder, bias), 6)
    monkeypatch.setitem(searching._PIECE_BYTES, "cpu", rows * 640 * 4)
    found = search(x, encoder, bias, 6, "cpu", dtype)
    np.testing.assert_array_equal(found[0], values)
    np.testing.assert_array_equal(found[1], indices)
