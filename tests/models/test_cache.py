"""The key-value cache: tokens in pieces give what they give at once, with padding anywhere."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.models.cache import Cache
from mergelab.models.model import Model, Output, Params
from tests.models.tiny_models import MASK, TOKENS, tiny
from tests.slow import slow_except

# Padding on the left, and a hole, which is padding on the right of an earlier piece.
HOLES = MASK.copy()
HOLES[2] = [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]


def in_pieces(model: Model, params: Params, cache: Cache, cuts: list[int]) -> tuple[np.ndarray, Cache]:
    @jax.jit
    def step(params: Params, tokens: jax.Array, mask: jax.Array, cache: Cache) -> Output:
        return model.apply(params, tokens, mask=mask, cache=cache)

    logits = []
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        output = step(params, TOKENS[:, start:stop], HOLES[:, start:stop], cache)
        assert output.cache is not None
        logits.append(np.asarray(output.logits))
        cache = output.cache
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize(
    "name", slow_except(["gpt2", "gemma3"], ["gpt2", "gpt_neox", "mistral", "mixtral", "gemma3"])
)
def test_tokens_in_pieces_give_what_they_give_at_once(name: str) -> None:
    model, params = tiny(name)
    whole = np.asarray(jax.jit(model.apply)(params, TOKENS, mask=HOLES).logits)
    found, cache = in_pieces(model, params, model.new_cache(3, 14), [7, 8, 9])
    np.testing.assert_allclose(found[HOLES], whole[HOLES], rtol=0, atol=2e-5)
    assert cache.length.tolist() == [10] * 3 and cache.slots == 14
    np.testing.assert_array_equal(cache.mask, np.pad(HOLES, ((0, 0), (0, 4))))


def test_what_padding_holds_does_not_matter() -> None:
    model, params = tiny("gemma2")
    apply = jax.jit(model.apply)
    other = np.where(HOLES, TOKENS, (TOKENS + 7) % 61).astype(np.int32)
    first, second = (np.asarray(apply(params, tokens, mask=HOLES).logits) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(first[HOLES], second[HOLES])
    assert np.abs(first - second).max() > 1e-2


def test_given_positions_are_used() -> None:
    model, params = tiny("gpt2")
    apply = jax.jit(model.apply)
    counted = np.maximum(HOLES.cumsum(1) - 1, 0).astype(np.int32)
    np.testing.assert_allclose(
        apply(params, TOKENS, mask=HOLES, positions=counted).logits,
        apply(params, TOKENS, mask=HOLES).logits,
        atol=1e-6,
    )
    moved = apply(params, TOKENS, mask=HOLES, positions=counted + 1).logits
    assert np.abs(np.asarray(moved - apply(params, TOKENS, mask=HOLES).logits)).max() > 1e-2


def test_edits_of_keys_and_values_stay_in_the_cache() -> None:
    model, params = tiny("llama")
    tokens, then, kept = jnp.asarray(TOKENS), jax.jit(model.apply), []
    for edit in ({}, {"blocks.0.attn.v": lambda v: -v}):
        start = jax.jit(partial(model.apply, edit=edit))
        first = start(params, tokens[:, :6], cache=model.new_cache(3, 8))
        kept.append(then(params, tokens[:, 6:7], cache=first.cache))
    plain, edited = kept
    assert plain.logits is not None and float(jnp.abs(plain.logits - edited.logits).max()) > 1e-2
    np.testing.assert_array_equal(plain.cache.values[0][:, :6], -edited.cache.values[0][:, :6])


def test_half_precision_runs_in_half_precision() -> None:
    model, params = tiny("gemma3")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens = jnp.asarray(TOKENS[:1])
    output = jax.jit(lambda p, c: model.apply(p, tokens, cache=c, capture=("*",)))(
        half, model.new_cache(1, 10, jnp.bfloat16)
    )
    assert output.cache.keys[0].dtype == output.captured["blocks.1.resid_post"].dtype == jnp.bfloat16
    assert output.logits.dtype == output.captured["blocks.0.attn.pattern"].dtype == jnp.float32
    exact = jax.jit(model.apply)(params, tokens).logits
    assert float(jnp.abs(output.logits - exact).mean()) < 0.1 * float(jnp.abs(exact).mean())


# One of each kind of attention: rotated, learned positions, windows in all layers and in some, norms of
# queries and keys, soft caps, experts; and a rotation that turns part of a head.
KINDS = ["llama", "gpt2", "gpt_neox", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


@pytest.mark.parametrize("name", slow_except(["mistral", "gemma3"], KINDS))
def test_rows_forked_and_rewound_go_on_as_each_would_alone(name: str) -> None:
    model, params = tiny(name)
    step = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
    whole = jax.jit(lambda tokens: model.apply(params, tokens).logits)
    read = step(jnp.asarray(TOKENS[:1, :8]), model.new_cache(1, 12)).cache
    far = read.repeat(3)  # one text that is read once, to be continued in three ways
    back = far.rewind(jnp.array([3, 8, 5]))
    assert back.length.tolist() == [3, 8, 5] and not back.even
    new = jnp.asarray(TOKENS[:, 8:10])
    found = step(new, back)
    assert found.cache.length.tolist() == [5, 10, 7]
    for row, kept in enumerate([3, 8, 5]):
        text = np.zeros((1, 10), np.int32)  # what follows the row's tokens, they do not see
        text[0, : kept + 2] = [*TOKENS[0, :kept], *TOKENS[row, 8:10]]
        np.testing.assert_allclose(found.logits[row], whole(text)[0, kept : kept + 2], atol=2e-5)
    # Without rewinding, the next tokens follow other ones.
    assert np.abs(np.asarray(step(new, far).logits)[0] - np.asarray(found.logits)[0]).max() > 1e-2


def test_a_repeated_cache_is_that_of_repeated_rows() -> None:
    model, params = tiny("llama")
    step = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache).cache)
    cache = step(TOKENS[:2, :4], model.new_cache(2, 6))
    assert cache is not None
    forked = cache.repeat(2)
    assert forked.length.shape == (4,) and forked.even and cache.rewind(2).even
    for copy, row in enumerate([0, 0, 1, 1]):
        np.testing.assert_array_equal(forked.keys[1][copy], cache.keys[1][row])
        np.testing.assert_array_equal(forked.mask[copy], cache.mask[row])
