"""Promoted texts become likelier, barred ones never appear, however they are spelled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelab.decoding import (
    FirstTokens,
    History,
    Temperature,
    ban_texts,
    ban_texts_of,
    complete,
    generate,
    greedy,
    pad_prompts,
    promote,
    promote_texts,
    sample,
)
from mergelab.errors import DecodingError
from tests.decoding.syllables import syllables
from tests.decoding.tiny import PROMPTS, tiny

PIECES = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"c", b"\xc3", b"\xa9"]


@jax.jit
def banned(rule: object, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    history = History(jnp.zeros((len(tokens), 10), bool), lengths, {}, tokens)
    return rule(jnp.zeros((len(tokens), 10), jnp.float32), history) == -jnp.inf  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 8), max_size=8),
    st.lists(st.sampled_from(["aba", "bb", "aabb", "é"]), min_size=3, max_size=3),
)
def test_exactly_the_tokens_that_would_complete_a_text_are_barred(new: list[int], texts: list[str]) -> None:
    rule = ban_texts(texts, PIECES, 10)
    rule = type(rule)(  # one shape for all examples
        np.pad(rule.following, ((0, 16 - len(rule.following)), (0, 0))),
        np.pad(rule.completes, ((0, 16 - len(rule.completes)), (0, 0))),
        np.zeros(8, np.int32),
    )
    # Only what has not been completed goes on: a row never holds a text.
    while any(text.encode() in b"".join(PIECES[t] for t in new) for text in texts):
        new = new[:-1]
    tokens = jnp.asarray([new + [0] * (8 - len(new))], jnp.int32)
    found = np.asarray(banned(rule, tokens, jnp.asarray([len(new)], jnp.int32)))[0]
    written = b"".join(PIECES[token] for token in new)
    expected = [any(text.encode() in written + piece for text in texts) for piece in PIECES]
    assert found.tolist() == [*expected, False]


def test_a_barred_text_is_in_no_sample() -> None:
    (model, params), tokenizer = tiny("llama"), syllables()
    options = {"max_new_tokens": 24, "samples": 4, "key": 2}
    free = complete(model, params, tokenizer, PROMPTS, sampler=sample(Temperature(1.5)), **options)
    texts = ["o", free[0].text[3:6]]
    assert sum(texts[1] in row.text for row in free) and all("o" in row.text for row in free)
    rule = ban_texts_of(tokenizer, texts, 61)
    found = complete(model, params, tokenizer, PROMPTS, sampler=sample(rule, Temperature(1.5)), **options)
    assert not [row.text for row in found if any(text in row.text for text in texts)]


def test_a_promoted_text_is_written_to_its_end() -> None:
    (model, params), tokenizer = tiny("llama"), syllables()
    text = tokenizer.decode([35, 9, 13, 22])[2:]
    rule = promote_texts(tokenizer, {text: 50.0})
    done = complete(model, params, tokenizer, PROMPTS, max_new_tokens=9, sampler=greedy(rule))
    for row in done:  # the first token is promoted everywhere, the others behind those before them
        assert row.token_ids[0] == 9 and set(row.token_ids) <= {9, 13, 22}
        pairs = list(zip(row.token_ids, row.token_ids[1:], strict=False))
        assert all((before, 13) == (9, 13) for before, token in pairs if token == 13)
        assert all(before == 13 for before, token in pairs if token == 22)
    assert any(text in row.text for row in done)
    logits = jnp.zeros((2, 61))
    history = History(
        jnp.zeros((2, 61), bool), jnp.asarray([2, 1]), {}, jnp.asarray([[9, 13, 0], [13, 0, 0]], jnp.int32)
    )
    added = np.asarray(promote([[9, 13, 22], [9]], [2.0, 1.0])(logits, history))
    assert added[0].nonzero()[0].tolist() == [9, 22] and added[1].nonzero()[0].tolist() == [9]
    assert (added[0, 9], added[0, 22]) == (3.0, 2.0)


def test_rows_begin_with_the_tokens_of_their_ranks() -> None:
    model, params = tiny("llama")
    prompt = PROMPTS[0]
    logits = jax.jit(lambda t: model.apply(params, t).logits)(jnp.asarray([prompt], jnp.int32))[0, -1]
    order = np.argsort(-np.asarray(logits))
    rule = FirstTokens(np.arange(4, dtype=np.int32))
    found = generate(model, params, [prompt], max_new_tokens=4, sampler=greedy(rule), samples=4)
    assert [row[0] for row in found.rows()] == order[:4].tolist()
    after = generate(
        model, params, *pad_prompts([[*prompt, row[0]] for row in found.rows()]), max_new_tokens=3
    )
    assert [row[1:] for row in found.rows()] == after.rows()


def test_what_token_sets_refuse() -> None:
    with pytest.raises(DecodingError, match="texts that are not empty"):
        ban_texts([""], PIECES, 10)
    with pytest.raises(DecodingError, match="at least one token id"):
        promote([[]], 1.0)
    with pytest.raises(DecodingError, match="finite numbers"):
        promote([[1]], float("inf"))
    with pytest.raises(DecodingError, match="one strength for each"):
        promote([[1]], [1.0, 2.0])
