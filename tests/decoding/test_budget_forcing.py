"""Thinking lasts as long as it is told to, and everything else is as it was."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from mergelab.decoding import (
    Temperature,
    Thinking,
    complete,
    complete_thinking,
    greedy,
    row_keys,
    sample,
    suppress,
)
from mergelab.decoding.completion import new_text
from mergelab.errors import DecodingError
from tests.decoding.syllables import PIECES, syllables
from tests.decoding.tiny import PROMPTS, tiny

TOKENIZER = syllables()
NEW = 24


@cache
def _whole() -> object:
    model, _ = tiny("llama")
    return jax.jit(lambda params, tokens: model.apply(params, tokens).logits)


def likeliest(text: list[int], banned: int | None = None) -> int:
    """The likeliest next token, by a whole pass."""
    padded = jnp.asarray([text + [0] * (32 - len(text))], jnp.int32)
    logits = _whole()(tiny("llama")[1], padded)[0, len(text) - 1]  # type: ignore[operator]
    return int(jnp.argmax(logits if banned is None else logits.at[banned].set(-jnp.inf)))


def by_hand(prompt: list[int], end: int, least: int, most: int | None, more: list[int]) -> list[int]:
    """Greedy budget forcing with an end of one token: as the issue describes it, token by token."""
    new: list[int] = []
    ended = False
    while len(new) < NEW:
        if ended:
            new.append(likeliest(prompt + new))
        elif most is not None and len(new) >= most:
            new, ended = [*new[:most], end], True
        elif (token := likeliest(prompt + new)) != end:
            new.append(token)
        elif len(new) >= least:
            new, ended = [*new, end], True
        elif more:
            new += more
        else:
            new.append(likeliest(prompt + new, banned=end))
    return new[:NEW]


def early_end() -> int:
    """A token that greedy search soon writes behind the first prompt."""
    model, params = tiny("llama")
    return complete(model, params, TOKENIZER, PROMPTS[:1], max_new_tokens=NEW)[0].token_ids[3]


@pytest.mark.parametrize(
    ("least", "most", "more"),
    [(0, 2, []), (9, None, [7]), (9, 14, [7, 21]), (12, 13, []), (10, 10, [7, 21])],
    ids=str,
)
def test_greedy_thinking_is_what_the_rule_says(least: int, most: int | None, more: list[int]) -> None:
    model, params = tiny("llama")
    end = early_end()
    thinking = Thinking(PIECES[end].replace("▁", " "), least, most, TOKENIZER.decode([35, *more])[2:])
    assert TOKENIZER.encode(thinking.more) == more and TOKENIZER.encode(thinking.end) == [end]
    done = complete_thinking(model, params, TOKENIZER, PROMPTS, thinking, max_new_tokens=NEW, log_probs=True)
    assert [list(row.token_ids) for row in done] == [by_hand(p, end, least, most, more) for p in PROMPTS]
    for prompt, row in zip(PROMPTS, done, strict=True):
        assert row.text == new_text(TOKENIZER, prompt, row.token_ids) and row.log_probability is not None
        thought = row.text.partition(thinking.end)[0]
        assert most is None or thinking.end in row.text
        assert len(TOKENIZER.encode(thought)) >= least
    free = complete(model, params, TOKENIZER, PROMPTS, max_new_tokens=NEW)
    assert done[0].token_ids != free[0].token_ids


def test_an_end_of_several_tokens_is_taken_back_and_samples_are_rows_of_their_own() -> None:
    model, params = tiny("llama")
    options = {"max_new_tokens": NEW, "sampler": sample(Temperature(1.5))}
    keys = row_keys(5, 3)
    free = complete(model, params, TOKENIZER, PROMPTS[:1], samples=3, key=keys, **options)
    end = TOKENIZER.decode([35, *free[1].token_ids[2:4]])[2:]
    thinking = Thinking(end, least=8, most=12, more=TOKENIZER.decode([35, 9, 13])[2:])
    assert len(TOKENIZER.encode(end)) == 2 and free[1].text.find(end) < 8
    done = complete_thinking(model, params, TOKENIZER, PROMPTS[:1], thinking, samples=3, key=keys, **options)
    for row in done:
        thought, found, _ = row.text.partition(end)
        assert found and 8 <= len(TOKENIZER.encode(thought)) <= 12
    before = free[1].token_ids[:2]
    assert done[1].token_ids[:4] == (*before, 9, 13)
    alone = complete_thinking(model, params, TOKENIZER, PROMPTS[:1], thinking, key=keys[1:2], **options)
    assert alone[0].token_ids == done[1].token_ids


@pytest.mark.slow
def test_what_is_put_in_and_says_the_end_itself_is_taken_back() -> None:
    assert "a" in TOKENIZER.decode(TOKENIZER.encode("e"))  # an unknown syllable is the first one, `ba`
    found, expected = (
        complete_thinking(
            *tiny("llama"), TOKENIZER, PROMPTS, Thinking("a", 6, None, more), max_new_tokens=NEW
        )
        for more in ("e", "")
    )
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]
    assert all("a" not in TOKENIZER.decode([35, *row.token_ids[:6]])[2:] for row in found)


def test_a_text_that_would_end_early_thinks_on_and_ends_later() -> None:
    model, params = tiny("llama")
    end = early_end()
    stopped = complete(model, params, TOKENIZER, PROMPTS[:1], max_new_tokens=NEW, end_ids=[end])
    assert len(stopped[0].token_ids) <= 4
    thinking = Thinking("never", least=6)
    done = complete_thinking(
        model, params, TOKENIZER, PROMPTS[:1], thinking, max_new_tokens=NEW, end_ids=[end]
    )
    barred = complete(
        model, params, TOKENIZER, PROMPTS[:1], max_new_tokens=6, sampler=greedy(suppress([end]))
    )
    assert done[0].token_ids[:6] == barred[0].token_ids
    begun = [[*PROMPTS[0], *barred[0].token_ids]]
    after = complete(model, params, TOKENIZER, begun, max_new_tokens=NEW - 6, end_ids=[end])
    assert (done[0].token_ids[6:], done[0].stop) == (after[0].token_ids, after[0].stop)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"end": ""}, "the text that ends thinking"),
        ({"least": -1}, "0 or more"),
        ({"most": 0}, "at least 1 token"),
        ({"least": 5, "most": 4}, "at least the least, 5"),
        ({"more": "xenda"}, "a text without 'end'"),
    ],
)
def test_what_thinking_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        Thinking(**{"end": "end", **settings})  # type: ignore[arg-type]


def test_an_end_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DecodingError, match=r"4 tokens of thinking and the 2 of 'boba'.* are 6, more"):
        complete_thinking(*tiny("llama"), TOKENIZER, PROMPTS[:1], Thinking("boba", most=4), max_new_tokens=5)
