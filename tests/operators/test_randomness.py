"""Random draws: the published cipher, keyed by seed, name, model and index alone, with the declared rates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from mergelab import operators as ops
from mergelab.operators.measures import pack_masks
from mergelab.operators.order_statistics import above_place, split_words
from mergelab.operators.region import Region, tensor_key, threefry, uniform, whole
from mergelab.operators.stages import MagPrune

SIDE = 256
SIZE = SIDE * SIDE
DRAWN = 21  # leading bits of every draw that are looked at


def drawn(merge: Any, x: np.ndarray, *, models: int = 1, name: str = "t", seed: int = 0) -> np.ndarray:
    """A merge of equal models relative to a base of zeros."""
    tree = merge([{name: x}] * models, {name: np.zeros_like(x)}, seed=seed)
    return np.asarray(tree[name])


WORD = st.integers(0, 2**32 - 1)


@given(WORD, WORD, WORD, WORD)
def test_the_cipher_is_jax_randoms(a: int, b: int, high: int, low: int) -> None:
    key, counter = (np.array(v, np.uint32) for v in ((a, b), (high, low)))
    expected = np.asarray(threefry_2x32(jnp.asarray(key), jnp.asarray(counter)))
    ours = threefry(
        (jnp.asarray(key[0]), jnp.asarray(key[1])), (jnp.asarray(counter[0]), jnp.asarray(counter[1]))
    )
    np.testing.assert_array_equal(np.asarray(ours), expected)


def test_uniform_fills_the_unit_interval_with_exact_multiples() -> None:
    u = np.asarray(uniform(whole((SIZE,), tensor_key(0, "t"), "float32").random_bits(1, 2)), np.float64)
    np.testing.assert_array_equal(u * 2**24, np.round(u * 2**24))
    assert 0 <= u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / SIZE)


def test_a_block_draws_what_the_whole_tensor_draws_there() -> None:
    key = tensor_key(3, "t")
    everything = np.asarray(whole((1000,), key, "float32").random_bits(1, 3))
    part = Region(split_words(300), key, (4, 50)).random_bits(1, 3)
    np.testing.assert_array_equal(np.asarray(part).reshape(-1), everything[300:500])


def test_models_names_seeds_and_operators_share_no_draws() -> None:
    shape = (SIZE,)
    streams = {
        (seed, name, salt, model): np.asarray(
            whole(shape, tensor_key(seed, name), "float32").random_bits(salt, model)
        )
        for seed in (0, 1)
        for name in ("a.weight", "b.weight")
        for salt in (1, 2)
        for model in (0, 1, 2, 3)
    }
    every = list(streams.values())
    assert all((x == y).mean() < 1e-4 for i, x in enumerate(every) for y in every[:i])


def test_no_bit_of_a_model_says_anything_about_another_bit_of_any_model() -> None:
    """Models share cipher calls, so this would see a bit that two of them were given."""
    region = whole((SIZE,), tensor_key(0, "t"), "float32")
    draws = [np.asarray(uniform(region.random_bits(1, model))) for model in range(7)]
    words = [(u * 2**DRAWN).astype(np.uint32) for u in draws]
    bits = np.stack([(word >> i) & 1 for word in words for i in range(DRAWN)]).astype(np.float32) * 2 - 1
    correlation = bits @ bits.T / SIZE - np.eye(len(bits))
    assert np.abs(correlation).max() < 6 / np.sqrt(SIZE)  # of 10,731 pairs, none beyond 6 sigma


def test_draws_depend_on_the_name_not_on_the_order_of_tensors() -> None:
    x = np.ones(64, np.float32)
    merge = ops.dare_linear(weight=1.0, density=0.5, rescale=False)
    one = merge([{"a": x, "b": x}], {"a": 0 * x, "b": 0 * x})
    alone = merge([{"b": x}], {"b": 0 * x})
    nested = merge([{"z": x, "b": x, "a": x}], {"z": 0 * x, "b": 0 * x, "a": 0 * x})
    np.testing.assert_array_equal(one["b"], alone["b"])
    np.testing.assert_array_equal(one["b"], nested["b"])
    assert not np.array_equal(one["a"], one["b"])
    assert not np.array_equal(one["a"], merge([{"a": x}], {"a": 0 * x}, seed=1)["a"])


def test_keys_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = "from mergelab.operators.region import tensor_key; print(*tensor_key(7, 'model.norm.weight'))"
    root = Path(__file__).resolve().parents[2]
    for hash_seed in ("0", "1234"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        out = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == [str(int(word)) for word in tensor_key(7, "model.norm.weight")]


def test_the_key_of_a_tensor_never_changes() -> None:
    """Recorded: another hash would silently change what every seed means."""
    assert tensor_key(0, "a").tolist() == [1742198805, 3555436242]
    assert tensor_key(7, "model.norm.weight").tolist() == [3326620216, 3488851120]


@pytest.mark.parametrize("density", [0.1, 0.25, 0.7])
def test_dare_has_the_papers_moments(density: float) -> None:
    """Mean delta, variance `delta^2 p / (1 - p)` with p = 1 - density, within 4 standard errors."""
    delta, p = 0.3, 1 - density
    x = np.full((SIDE, SIDE), delta, np.float32)
    out = drawn(ops.dare_linear(weight=1.0, density=density, rescale_by="density"), x).astype(np.float64)
    kept = out != 0
    np.testing.assert_allclose(out[kept], delta / density, rtol=1e-6)
    assert abs(kept.mean() - density) < 4 * np.sqrt(density * p / SIZE)
    variance = delta**2 * p / density
    assert abs(out.mean() - delta) < 4 * np.sqrt(variance / SIZE)
    # Kept or not is a Bernoulli draw, so the spread of the sample variance follows from its fourth moment.
    fourth = density * (delta / density - delta) ** 4 + p * delta**4
    assert abs(out.var() - variance) < 4 * np.sqrt((fourth - variance**2) / SIZE)


def test_dare_in_mergekits_form_keeps_the_l1_norm() -> None:
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    out = drawn(ops.dare_linear(weight=1.0, density=0.3), x)
    np.testing.assert_allclose(np.abs(out).sum(dtype=np.float64), np.abs(x).sum(dtype=np.float64), rtol=1e-6)
    unscaled = drawn(ops.dare_linear(weight=1.0, density=0.3, rescale=False), x)
    assert abs(np.abs(unscaled).sum() / np.abs(x).sum() - 0.3) < 0.02


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.2, 0.1)])
def test_della_keeps_by_rank_within_the_row(density: float, epsilon: float) -> None:
    """Element of ascending rank r among C is kept with probability `density - eps + 2 eps r / (C - 1)`."""
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(SIDE) for _ in range(SIDE)])
    x = (ranks + 1).astype(np.float32) * np.where(rng.random((SIDE, SIDE)) < 0.5, -1, 1).astype(np.float32)
    merge = ops.della_linear(weight=1.0, density=density, epsilon=epsilon, rescale=False)
    kept = np.stack([drawn(merge, x, seed=seed) != 0 for seed in range(2)])
    probability = density - epsilon + 2 * epsilon * ranks / (SIDE - 1)
    for low in range(0, SIDE, SIDE // 8):
        of_rank = (ranks >= low) & (ranks < low + SIDE // 8)
        p = probability[of_rank].mean()
        draws = 2 * of_rank.sum()
        assert abs(kept[:, of_rank].mean() - p) < 4 * np.sqrt(p * (1 - p) / draws), low
    flat = kept[:, ranks < SIDE // 8].mean() - kept[:, ranks >= SIDE - SIDE // 8].mean()
    assert flat < -epsilon  # a constant keep probability would not do


@pytest.mark.parametrize("values", [1000, 5, 1])
@pytest.mark.parametrize("epsilon", [0.25, 0.0])
def test_della_decides_every_entry_by_the_ranks_its_magnitude_takes_up(values: int, epsilon: float) -> None:
    """With ranks `first` to `last` (from the largest) of equals: by the first or the last, at even odds."""
    x = np.random.default_rng(0).integers(1, values + 1, (64, 33)).astype(np.float32)
    region = whole(x.shape, tensor_key(0, "w"), "float32")
    (question,) = (stage := MagPrune(0.5, epsilon)).ask((jnp.asarray(x),), None, region, ())
    (out,) = stage.apply((jnp.asarray(x),), None, region, (pack_masks([above_place(question)]),))
    bits = np.asarray(region.random_bits(2, 0))
    larger = (x[:, None, :] > x[:, :, None]).sum(-1)
    equal = (x[:, None, :] == x[:, :, None]).sum(-1)
    rank = np.where(bits & 1, larger, larger + equal - 1)
    kept = bits / 2.0**21 < 0.5 + epsilon * (1 - 2 * rank / 32)
    np.testing.assert_array_equal(np.asarray(out) != 0, kept)
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(kept.size)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize(("density", "survives"), [(0.0, False), (1.0, True)])
def test_densities_zero_and_one_draw_nothing(name: str, density: float, survives: bool) -> None:
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    out = drawn(ops.OPERATORS[name](weight=1.0, density=density), x)
    np.testing.assert_array_equal(out, x if survives else np.zeros_like(x))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_the_mean_of_many_masks_approaches_the_mean(name: str) -> None:
    """An entry kept with probability p by each of n masks is off by p (1 - p) / n in the mean square."""
    density, draws = 0.3, 8
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    form = {"rescale_by": "density"} if name == "dare_linear" else {"rescale": False, "epsilon": 0.0}
    off = []
    for n in (1, draws):
        out = drawn(ops.OPERATORS[name](weight=1.0, density=density, draws=n, **form), x)
        share = out / x * (density if name == "dare_linear" else 1)
        assert abs(share.mean(dtype=np.float64) - density) < 4 * np.sqrt(density * (1 - density) / n / SIZE)
        off.append(np.mean(np.square(share - density, dtype=np.float64)))
    np.testing.assert_allclose(off[0], density * (1 - density), rtol=0.02)
    np.testing.assert_allclose(off[1], density * (1 - density) / draws, rtol=0.05)


def test_the_first_of_many_masks_is_the_only_one_of_one() -> None:
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    one, two = (drawn(ops.dare_linear(weight=1.0, density=0.5, rescale=False, draws=n), x) for n in (1, 2))
    assert set(np.unique(two / x).tolist()) == {0.0, 0.5, 1.0}
    assert (two[one != 0] != 0).all() and (two[one == 0] != x[one == 0]).all()
