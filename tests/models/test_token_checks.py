"""Ids and lengths that a model has no embeddings for are errors, wherever tokens enter, and never NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.activations.capture import capture
from mergelab.activations.losses import summed_loss
from mergelab.activations.model_activations import ModelActivations
from mergelab.decoding import generate
from mergelab.errors import DecodingError, TokenError
from mergelab.interp.lens import logit_lens, read_lens, train_tuned_lens
from mergelab.models.model import Model
from mergelab.models.token_checks import check_tokens, window_length
from tests.models import tiny_models

VOCAB, ROOM = 61, 32
LEARNED = ("gpt2", "bert")
SITE = "blocks.0.resid_post"


@cache
def tiny(kind: str) -> tuple[Model, Any]:
    """A tiny model with 32 positions."""
    model, params = tiny_models.tiny(kind)
    if model.config.max_length != ROOM:
        model = replace(model, config=replace(model.config, max_length=ROOM))
        if "positions" in params:
            params = params | {"positions": {"embedding": params["positions"]["embedding"][:ROOM]}}
    return model, params


def ids(length: int = 5, *, bad: int | None = None) -> np.ndarray:
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) % VOCAB
    if bad is not None:
        tokens[1, 2] = bad
    return tokens


def device(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.bool_ if values.dtype == bool else jnp.int32)


def loss(model: Model, params: Any, tokens: np.ndarray) -> float:
    return summed_loss(model, params, tokens, np.ones((len(tokens), tokens.shape[1] - 1), bool))


ENTRIES: dict[str, Callable[[Model, Any, np.ndarray], Any]] = {
    "apply": lambda m, p, t: m.apply(p, jnp.asarray(t)).hidden,
    "capture": lambda m, p, t: capture(m, p, t, SITE)[SITE],
    "activations": lambda m, p, t: ModelActivations(m, p, t, (SITE,)).read_sites(0, 3),
}
DECODERS: dict[str, Callable[[Model, Any, np.ndarray], Any]] = {
    "lens": lambda m, p, t: logit_lens(m, p, t, SITE)[SITE],
    "read_lens": lambda m, p, t: read_lens(m, p, t),
    "train_tuned_lens": lambda m, p, t: train_tuned_lens(m, p, iter([t]), steps=1),
    "text loss": loss,
}
CASES = [("gpt2", name, call) for name, call in (ENTRIES | DECODERS).items()]
CASES += [
    (kind, name, ENTRIES[name]) for kind, name in (("bert", "apply"), ("bert", "capture"), ("llama", "apply"))
]


@pytest.mark.parametrize(("kind", "name", "call"), CASES, ids=[f"{k} {n}" for k, n, _ in CASES])
def test_ids_that_are_none_are_refused(kind: str, name: str, call: Callable[..., Any]) -> None:
    model, params = tiny(kind)
    length = ROOM + int(name == "text loss")  # as in the next test, which so finds its programs compiled
    for bad in (VOCAB, 233):
        with pytest.raises(TokenError, match=f"token {bad} is beyond the model's vocabulary of {VOCAB}"):
            call(model, params, ids(length, bad=bad))
    with pytest.raises(TokenError, match="token -1 is negative"):
        call(model, params, ids(length, bad=-1))
    call(model, params, ids(length, bad=VOCAB - 1))  # the control: the last row is a token


@pytest.mark.parametrize(("kind", "name", "call"), CASES, ids=[f"{k} {n}" for k, n, _ in CASES])
def test_more_tokens_than_learned_positions_are_refused(
    kind: str, name: str, call: Callable[..., Any]
) -> None:
    model, params = tiny(kind)
    shift = int(name == "text loss")  # its first column is read, its last only predicted
    if kind in LEARNED:
        message = f"{ROOM + 1} tokens are more than the model's {ROOM} learned positions"
        with pytest.raises(TokenError, match=message):
            call(model, params, ids(ROOM + 1 + shift))
    else:  # rotary positions do not end
        call(model, params, ids(ROOM + 1 + shift))
    call(model, params, ids(ROOM + shift))


@pytest.mark.parametrize("kind", LEARNED)
def test_a_length_is_refused_while_the_tokens_are_traced(kind: str) -> None:
    model, params = tiny(kind)
    run = jax.jit(lambda tokens: model.apply(params, tokens).hidden)
    with pytest.raises(TokenError, match="more than the model's 32 learned positions"):
        run(device(ids(ROOM + 1)))
    assert np.isfinite(np.asarray(run(device(ids(ROOM))))).all()


def test_padding_takes_no_position_and_positions_that_are_given_are_checked() -> None:
    model, params = tiny("gpt2")
    tokens, mask = device(ids(ROOM + 6)), np.arange(ROOM + 6)[None] >= np.array([[6], [9]])
    assert np.isfinite(np.asarray(model.apply(params, tokens, mask=device(mask)).hidden)[mask]).all()
    with pytest.raises(TokenError, match="38 tokens are more"):
        model.apply(params, tokens, mask=device(np.ones_like(mask)))
    with pytest.raises(TokenError, match=r"position 32 is none of .* 32 learned positions \(0 to 31\)"):
        model.apply(params, device(ids()), positions=device(np.full((2, 5), ROOM)))
    with pytest.raises(TokenError, match="position -1"):
        model.apply(params, device(ids()), positions=device(np.full((2, 5), -1)))


def test_a_cache_does_not_lead_beyond_the_positions() -> None:
    model, params = tiny("gpt2")
    cache = model.apply(params, device(ids(ROOM)), cache=model.new_cache(2, ROOM + 8)).cache
    with pytest.raises(TokenError, match="position 32"):
        model.apply(params, device(ids(1)), cache=cache)
    with pytest.raises(TokenError, match="33 tokens are more"):
        model.apply(params, device(ids(ROOM + 1)), cache=model.new_cache(2, ROOM + 8))


def test_segments_are_checked() -> None:
    model, params = tiny("bert")
    with pytest.raises(TokenError, match="token_types: token 2 is beyond the model's token types of 2"):
        model.apply(params, device(ids()), token_types=device(np.full((2, 5), 2)))


def test_generation_refuses_in_its_own_words() -> None:
    model, params = tiny("gpt2")
    with pytest.raises(DecodingError, match="ids from 0 to 233"):
        generate(model, params, ids(bad=233), max_new_tokens=1)
    with pytest.raises(DecodingError, match=r"34 positions.* at most the model's 32"):
        generate(model, params, ids(ROOM - 3), max_new_tokens=6)
    assert generate(model, params, ids(ROOM - 3), max_new_tokens=4).tokens.shape == (2, 4)


def test_ids_are_compared_before_they_are_narrowed() -> None:
    model, _ = tiny("gpt2")
    with pytest.raises(TokenError, match="token 4294967301 is beyond"):
        check_tokens(model, np.array([[2**32 + 5]], np.int64))
    with pytest.raises(TokenError, match="token ids are float32 where integers"):
        check_tokens(model, np.zeros((1, 2), np.float32))


def test_windows_that_nobody_asked_for_are_cut_and_others_refused() -> None:
    model, _ = tiny("llama")
    assert [window_length(model, asked, 512) for asked in (None, 7, ROOM)] == [ROOM, 7, ROOM]
    assert window_length(model, None, 16) == 16
    with pytest.raises(TokenError, match="text: 33 tokens are more than the model's 32 positions"):
        window_length(model, ROOM + 1, 512, place="text")
