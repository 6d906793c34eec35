"""A conversation that is read turn by turn gives what reading all of it at once gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mergelab.decoding import Memory, begin, greedy, memory, row_keys, stop_at
from mergelab.decoding.steps import Steps
from mergelab.models.families import model_from_config
from tests.decoding.tiny import tiny
from tests.models.tiny_models import CONFIGS, params_of, weights

TURNS = [[3, 14, 15, 9], [7, 5], [11]]
NEW = 3


def answer(held: Memory, model: Any, params: Any, prompt: Sequence[int], new: int) -> list[int]:
    stop = stop_at()
    progress = held.begin(model, params, prompt, max_new_tokens=new, stop=stop)
    steps = Steps(model, params, sampler=greedy(), keys=row_keys(0, 1), stop=stop, edit={})
    done = steps.advance(progress, new)
    held.keep(prompt, done)
    return np.asarray(done.tokens)[0, :new].tolist()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each turn reads before it generates."""
    counts: list[int] = []
    usual = memory.read_on

    def counted(model: Any, params: Any, tokens: Any, mask: Any, cache: Any) -> Any:
        counts.append(int(np.asarray(mask).sum()))
        return usual(model, params, tokens, mask, cache)

    monkeypatch.setattr(memory, "read_on", counted)
    return counts


def assert_read_as_one(held: Memory, model: Any, params: Any) -> None:
    """Keys and values are those of a pass over all tokens."""
    assert held._cache is not None
    whole = begin(model, params, [[*held.tokens, 0]], max_new_tokens=1, stop=stop_at()).cache
    mine, other = np.asarray(held._cache.mask), np.asarray(whole.mask)
    assert mine.sum() == other.sum() == len(held.tokens)
    for found, expected in zip(
        (*held._cache.keys, *held._cache.values), (*whole.keys, *whole.values), strict=True
    ):
        np.testing.assert_allclose(np.asarray(found)[mine], np.asarray(expected)[other], rtol=2e-5, atol=2e-5)


def test_turns_are_read_as_one_text(read: list[int]) -> None:
    model, params = tiny("mistral")  # a window of four slots
    held, text = Memory(), []
    for turn in TURNS:
        text += turn
        found = answer(held, model, params, text, NEW)
        assert held.tokens == (*text, *found[:-1])
        text += [*found[:2], (found[2] + 1) % 61]  # a template may write an answer otherwise
    assert_read_as_one(held, model, params)
    # The last token of a prompt is read by the first step; the altered one with the turn after it.
    assert read == [3, 2, 1]
    held._tokens = (*text[:5], 60, *text[6:8])
    with pytest.raises(AssertionError):
        assert_read_as_one(held, model, params)


def test_a_cache_grows_with_its_text(read: list[int]) -> None:
    model, params = tiny("mistral")
    held, text = Memory(), TURNS[0]
    answer(held, model, params, text, 2)
    assert held._cache is not None and held._cache.slots == 24
    answer(held, model, params, [*text, *range(1, 20)], 2)
    assert held._cache is not None and held._cache.slots == 48 and read == [3, 18]
    assert_read_as_one(held, model, params)


def test_a_text_that_outgrows_longrope_is_read_from_its_beginning(read: list[int]) -> None:
    model = model_from_config({**CONFIGS["phi3, longrope"], "original_max_position_embeddings": 9})
    params = params_of(model, weights(model))
    held, text = Memory(), [3, 14, 15]
    for turn in ([], [7], [1]):
        text = [*text, *turn]
        text += answer(held, model, params, text, 3)
        if len(held.tokens) != 9:  # in this one the tenth is still to be read, which turns all of them
            assert_read_as_one(held, model, params)
    assert read == [2, 1, 10]
