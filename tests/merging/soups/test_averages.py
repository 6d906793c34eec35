"""Averages of streams: equal to the plain mean, in any order, under jit and on sharded arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergelab.compat import enable_x64
from mergelab.errors import OperatorError
from mergelab.merging.soups import (
    ExponentialAverage,
    RunningAverage,
    exponential_soup,
    last_soup,
    uniform_soup,
)


def trees(count: int, seed: int = 0, dtype: type | np.dtype = np.float32) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {"w": rng.normal(size=(4, 6)).astype(dtype), "block": {"b": rng.normal(size=6).astype(dtype)}}
        for _ in range(count)
    ]


def mean(items: list[dict], leaf: str) -> np.ndarray:
    return np.mean([np.asarray(t[leaf], np.float64) for t in items], axis=0)


@given(count=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_running_average_is_the_mean(count: int, seed: int) -> None:
    with enable_x64(True):
        items = trees(count, seed, np.float64)
        soup = uniform_soup(items)
        assert soup["w"].dtype == np.float64
        np.testing.assert_allclose(soup["w"], mean(items, "w"), rtol=0, atol=1e-14)
        # Negative control: leaving one tree out is seen at this tolerance.
        if count > 1:
            assert np.abs(np.asarray(uniform_soup(items[1:])["w"]) - mean(items, "w")).max() > 1e-10


@given(seed=st.integers(0, 1000))
def test_a_uniform_soup_does_not_depend_on_the_order(seed: int) -> None:
    items = trees(9, seed)
    order = np.random.default_rng(seed).permutation(9)
    shuffled = uniform_soup([items[i] for i in order])
    np.testing.assert_allclose(uniform_soup(items)["w"], shuffled["w"], rtol=0, atol=1e-6)


def test_rounding_does_not_compound_in_a_narrow_dtype() -> None:
    items = trees(200, dtype=ml_dtypes.bfloat16)
    soup = uniform_soup(items)
    assert soup["w"].dtype == jnp.bfloat16
    exact = mean(items, "w")
    np.testing.assert_array_equal(np.asarray(soup["w"]), exact.astype(np.float32).astype(ml_dtypes.bfloat16))
    naive = items[0]["w"]
    for n, tree in enumerate(items[1:], start=1):
        naive = (naive.astype(np.float32) * n / (n + 1) + tree["w"].astype(np.float32) / (n + 1)).astype(
            ml_dtypes.bfloat16
        )
    drifted = np.mean(naive != np.asarray(soup["w"]))
    assert drifted > 0.5, "the control, which rounds at every step, should have drifted"


def test_under_jit_and_scan_it_is_the_same() -> None:
    items = trees(5)
    state = RunningAverage.of(items[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *items[1:])
    state, _ = jax.jit(lambda s, xs: jax.lax.scan(lambda s, x: (s.add(x), None), s, xs))(state, stacked)
    assert int(state.count) == 5
    np.testing.assert_allclose(state.result()["w"], uniform_soup(items)["w"], rtol=0, atol=1e-6)


def test_sharded_trees_keep_their_sharding_and_give_the_same_bits() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    items = trees(6)
    placed = [{**t, "w": jax.device_put(t["w"], sharding)} for t in items]
    soup = uniform_soup(placed)
    assert soup["w"].sharding == sharding
    np.testing.assert_array_equal(np.asarray(soup["w"]), np.asarray(uniform_soup(items)["w"]))


def test_only_one_loader_is_open_at_a_time() -> None:
    items = trees(4)
    log: list[int] = []

    def loader(i: int):
        def load() -> dict:
            log.append(i)
            return items[i]

        return load

    soup = last_soup((loader(i) for i in range(4)), 2)
    assert log == [2, 3], "the first loaders of the stream were never called"
    np.testing.assert_allclose(soup["w"], mean(items[2:], "w"), rtol=0, atol=1e-6)


def test_last_of_a_short_stream_is_all_of_it() -> None:
    items = trees(2)
    np.testing.assert_array_equal(last_soup(items, 9)["w"], uniform_soup(items)["w"])
    with pytest.raises(OperatorError, match="count is 0"):
        last_soup(items, 0)


def test_the_exponential_average_is_its_closed_form() -> None:
    items, decay = trees(6), 0.8
    weights = [decay**5, *((1 - decay) * decay ** (5 - i) for i in range(1, 6))]
    expected = sum(w * np.asarray(t["w"], np.float64) for w, t in zip(weights, items, strict=True))
    np.testing.assert_allclose(exponential_soup(items, decay)["w"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(exponential_soup(items, 1.0)["w"], items[0]["w"])
    np.testing.assert_allclose(exponential_soup(items, 0.0)["w"], items[-1]["w"], rtol=0, atol=1e-6)
    with pytest.raises(OperatorError, match=r"decay is 1\.5"):
        ExponentialAverage.of(items[0], 1.5)


def test_an_exponential_average_is_differentiable_in_its_decay() -> None:
    first, second = trees(2)
    gradient = jax.grad(lambda d: ExponentialAverage.of(first, d).add(second).result()["w"].sum())(0.5)
    np.testing.assert_allclose(gradient, (first["w"] - second["w"]).sum(), rtol=1e-5)


def test_counters_are_carried_over_if_equal_and_refused_if_not() -> None:
    a, b = ({"w": np.ones(2, np.float32), "step": np.int32(n)} for n in (3, 3))
    assert int(uniform_soup([a, b])["step"]) == 3
    with pytest.raises(OperatorError, match="'step' is of type int32 and differs"):
        uniform_soup([a, {**b, "step": np.int32(4)}])


def test_different_architectures_are_refused() -> None:
    a, b = trees(2)
    with pytest.raises(OperatorError, match=r"leaf 'block\.b' is only in the trees averaged so far"):
        uniform_soup([a, {"w": b["w"]}])
    with pytest.raises(OperatorError, match=r"'w' has shape \(6, 4\).* \(4, 6\)"):
        uniform_soup([a, {**b, "w": b["w"].T}])
    with pytest.raises(OperatorError, match="no trees"):
        uniform_soup([])
