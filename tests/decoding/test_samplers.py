"""Transforms are transformers' logits processors and their own closed forms; samplers draw what they say."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergelab.decoding import (
    History,
    LogitsTransform,
    MinNewTokens,
    MinPFilter,
    RepetitionPenalty,
    Sampler,
    Temperature,
    TopKFilter,
    TopPFilter,
    chain,
    greedy,
    logit_bias,
    row_keys,
    sample,
    sampler_from_options,
    suppress,
)
from mergelab.errors import DecodingError
from tests.decoding.record_processors import CASES, RECORDED, inputs, processors

TRANSFORMS: dict[str, LogitsTransform] = {
    "repetition_penalty": RepetitionPenalty(CASES["repetition_penalty"]),
    "temperature": Temperature(CASES["temperature"]),
    "top_k": TopKFilter(int(CASES["top_k"])),
    "top_p": TopPFilter(CASES["top_p"]),
    "min_p": MinPFilter(CASES["min_p"]),
}
TRANSFORMS["together"] = chain(*TRANSFORMS.values())

rows = arrays(np.float32, (2, 9), elements=st.floats(-8, 8, width=32, allow_subnormal=False))


def history(tokens: np.ndarray, vocab: int) -> History:
    seen = (tokens[:, :, None] == np.arange(vocab)).any(axis=1)
    return History(jnp.asarray(seen), jnp.zeros(len(tokens), jnp.int32))


def run(transform: LogitsTransform, logits: np.ndarray, generated: int = 0) -> np.ndarray:
    blank = History(jnp.zeros(logits.shape, bool), jnp.full(len(logits), generated, jnp.int32))
    return np.asarray(apply(transform, logits, blank))


@jax.jit
def apply(transform: LogitsTransform, logits: jax.Array, history: History) -> jax.Array:
    return transform(logits, history)


@jax.jit
def draw_all(sampler: Sampler, logits: jax.Array, history: History, keys: jax.Array) -> jax.Array:
    return sampler(logits, history, keys)


def probabilities(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def ours(name: str) -> np.ndarray:
    tokens, logits = inputs()
    return np.asarray(apply(TRANSFORMS[name], jnp.asarray(logits), history(tokens, 23)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_the_recorded_processors(name: str) -> None:
    recorded = np.array(json.loads(RECORDED.read_text())[name], np.float64)  # None becomes NaN
    result = ours(name)
    np.testing.assert_array_equal(np.isinf(result), np.isnan(recorded))
    np.testing.assert_allclose(np.where(np.isinf(result), np.nan, result), recorded, atol=2e-5)
    assert name == "temperature" or not np.allclose(result, ours("temperature"))


@pytest.mark.oracle
def test_transforms_are_those_of_transformers() -> None:
    for name, expected in processors().items():
        np.testing.assert_allclose(ours(name), expected, rtol=1e-6, err_msg=name)


@given(rows, st.integers(1, 12))
def test_top_k_keeps_the_k_largest_and_their_ties(logits: np.ndarray, k: int) -> None:
    kept = np.isfinite(run(TopKFilter(k), logits))
    ranks = (logits[:, None, :] > logits[:, :, None]).sum(axis=2)  # how many are larger
    np.testing.assert_array_equal(kept, ranks < k)


@given(rows, st.floats(0.05, 0.95))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits: np.ndarray, p: float) -> None:
    kept = np.isfinite(run(TopPFilter(p), logits))
    for scores, row, mask in zip(logits, probabilities(logits), kept, strict=True):
        assert mask[scores.argmax()]  # logits that differ may round to one probability
        assert row[mask].sum() >= p - 1e-5
        without_least = row[mask & (row > row[mask].min() * (1 + 1e-6))]
        assert without_least.sum() <= p + 1e-5  # dropping the least likely (and its ties) falls short
        assert row[~mask].max(initial=0.0) <= row[mask].min() * (1 + 1e-6)


@given(rows, st.floats(0.01, 1.0))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits: np.ndarray, p: float) -> None:
    kept = np.isfinite(run(MinPFilter(p), logits))
    ratio = probabilities(logits) / probabilities(logits).max(axis=-1, keepdims=True)
    clear = np.abs(ratio - p) > 1e-5
    np.testing.assert_array_equal(kept[clear], (ratio >= p)[clear])
    assert kept.any(axis=1).all()


@given(rows)
def test_neutral_settings_change_nothing(logits: np.ndarray) -> None:
    neutral = chain(
        Temperature(1.0),
        TopKFilter(9),
        TopPFilter(1.0),
        MinPFilter(0.0),
        RepetitionPenalty(1.0),
        logit_bias({}),
    )
    np.testing.assert_array_equal(run(neutral, logits), logits)
    assert not np.array_equal(run(chain(neutral, Temperature(2.0)), logits + 1), logits + 1)


@given(rows)
def test_one_value_per_row_is_each_value_alone(logits: np.ndarray) -> None:
    values = np.array([0.4, 0.9], np.float32)
    for kind in (Temperature, TopPFilter, MinPFilter):
        alone = [run(kind(float(v)), logits[i : i + 1])[0] for i, v in enumerate(values)]
        np.testing.assert_array_equal(run(kind(values), logits), np.stack(alone))


def test_a_penalty_never_raises_a_logit_and_spares_the_unseen() -> None:
    logits = np.array([[2.0, -2.0, 0.0, 4.0]], np.float32)
    seen = History(jnp.array([[True, True, True, False]]), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(RepetitionPenalty(2.0)(jnp.asarray(logits), seen), [[1.0, -4.0, 0.0, 4.0]])


def test_biases_and_suppression_reach_their_tokens_alone() -> None:
    logits = np.zeros((2, 4), np.float32)
    biased = run(logit_bias({1: 2.5, 3: -np.inf, 99: 7.0}), logits)
    np.testing.assert_array_equal(biased, [[0, 2.5, 0, -np.inf]] * 2)
    np.testing.assert_array_equal(run(suppress([0, 2, 99]), logits), [[-np.inf, 0, -np.inf, 0]] * 2)
    np.testing.assert_array_equal(run(suppress([]), logits), logits)


@pytest.mark.parametrize("generated", [0, 2, 3])
def test_ends_are_forbidden_until_enough_is_generated(generated: int) -> None:
    result = run(MinNewTokens(3, np.array([1])), np.zeros((1, 3), np.float32), generated)
    assert np.isneginf(result[0, 1]) == (generated < 3)


def test_draws_follow_the_truncated_distribution() -> None:
    logits = np.tile(np.log([0.5, 0.25, 0.15, 0.1]).astype(np.float32), (20_000, 1))
    blank = History(jnp.zeros(logits.shape, bool), jnp.zeros(len(logits), jnp.int32))
    sampler = sample(TopKFilter(3))
    tokens = np.asarray(draw_all(sampler, jnp.asarray(logits), blank, row_keys(3, len(logits))))
    share = np.bincount(tokens, minlength=4) / len(tokens)
    expected = np.array([0.5, 0.25, 0.15, 0.0]) / 0.9
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / len(tokens))
    assert np.abs(share - np.array([0.5, 0.25, 0.15, 0.1])).max() > 0.03


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, 40)).astype(np.float32))
    keys = row_keys(jax.random.key(5), 6)
    sampler = sample(Temperature(1.5), TopPFilter(0.95))

    def draw(order: list[int]) -> list[int]:
        blank = History(jnp.zeros((len(order), 40), bool), jnp.zeros(len(order), jnp.int32))
        rows = np.array(order)
        return draw_all(sampler, logits[rows], blank, keys[rows]).tolist()

    whole = draw([0, 1, 2, 3, 4, 5])
    assert draw([4]) == whole[4:5] and draw([3, 0]) == [whole[3], whole[0]]
    assert len(set(whole)) > 1


def test_another_temperature_needs_no_compilation_and_gradients_pass() -> None:
    compiled = jax.jit(lambda t, x: t(x, history(np.zeros((1, 1), int), 3)))
    logits = jnp.array([[1.0, 2.0, 3.0]])
    for temperature in (0.5, 0.6):
        compiled(Temperature(temperature), logits)
    assert compiled._cache_size() == 1
    slope = jax.grad(lambda t: compiled(Temperature(t), logits)[0, 2])(2.0)
    assert slope == pytest.approx(-3.0 / 4.0)


def test_options_become_the_sampler_they_name() -> None:
    assert sampler_from_options(temperature=0, top_k=5) == greedy()
    every = sampler_from_options(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert every == sample(
        RepetitionPenalty(1.2), Temperature(0.7), TopKFilter(5), TopPFilter(0.9), MinPFilter(0.1)
    )
    assert sampler_from_options(top_k=0) == sample(Temperature(1.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Temperature(0.0), r"Temperature was given 0.0, but needs a positive number \(choose"),
        (lambda: TopKFilter(0), "TopKFilter was given 0, but needs an integer of at least 1"),
        (lambda: TopPFilter(1.5), "TopPFilter was given 1.5, but needs a probability"),
        (lambda: MinPFilter(-0.1), "MinPFilter was given -0.1"),
        (lambda: RepetitionPenalty(0.0), "RepetitionPenalty was given 0.0"),
        (lambda: logit_bias({-1: 2.0}), "token ids of at least 0"),
        (lambda: logit_bias({1: float("nan")}), "finite biases"),
        (lambda: suppress([-3]), "token ids of at least 0"),
        (lambda: row_keys(jnp.zeros(2, jnp.uint32), 3), "a seed, jax.random.key"),
        (lambda: row_keys(jax.random.split(jax.random.key(0), 2), 3), "or 3 such keys"),
    ],
)
def test_settings_without_meaning_are_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(DecodingError, match=message):
        build()
