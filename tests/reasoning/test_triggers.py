"""Forks where a reading exceeds its bound, and edits that end with thinking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.decoding import Temperature, sample
from mergelab.errors import DecodingError
from mergelab.interp.probes import Probe
from mergelab.reasoning import (
    MethodOptions,
    Writer,
    attempt,
    disagreement_reading,
    write_forking,
    write_while_thinking,
)
from tests.decoding.syllables import syllables
from tests.decoding.tiny import tiny

SITE = "blocks.0.resid_post"
PROMPT = [3, 14, 15, 9]
BUDGET = 10


def writer_with(above: float) -> Writer:
    model, params = tiny("llama")
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((24, 1)), jnp.float32)
    reading = disagreement_reading(Probe(weights, jnp.asarray([0.0])), SITE, above)
    return Writer(model, params, syllables(), BUDGET, sample(Temperature(2.0)), (reading,), step="a")


def test_a_trace_is_forked_where_probe_and_entropy_disagree() -> None:
    free = attempt(writer_with(2.0), PROMPT, MethodOptions("vote", 1), 5).traces[0]
    order = np.sort(free.readings[:4, 0])
    bound = float(order[-2:].mean())  # one of the first four tokens is beyond it
    place = int(np.flatnonzero(free.readings[:, 0] > bound)[0])
    traces, generated = write_forking(writer_with(bound), PROMPT, 4, 5)
    assert 2 <= len(traces) <= 4 and all(len(trace.token_ids) == BUDGET for trace in traces)
    assert traces[0].token_ids == free.token_ids  # the row that was there goes on as it would have
    shared = [
        next((n for n in range(BUDGET) if t.token_ids[n] != free.token_ids[n]), BUDGET) for t in traces[1:]
    ]
    assert min(shared) >= place + 1
    assert generated < len(traces) * BUDGET  # what forks share was written once
    alone, _ = write_forking(writer_with(2.0), PROMPT, 4, 5)
    assert [trace.token_ids for trace in alone] == [free.token_ids]
    with pytest.raises(DecodingError, match="a reading with a bound"):
        write_forking(replace(writer_with(1.0), readings=()), PROMPT, 2)


def test_an_edit_ends_with_thinking() -> None:
    writer = replace(writer_with(2.0), budget=14)
    push = 3.0 * np.random.default_rng(1).standard_normal(24).astype(np.float32)

    def edit(x: Any) -> Any:
        return x + jnp.broadcast_to(jnp.asarray(push), x.shape)

    thought = write_while_thinking(writer, PROMPT, 4, 7, edit={SITE: edit}, end="u")
    whole = attempt(replace(writer, edit={SITE: edit}), PROMPT, MethodOptions("vote", 4), 7).traces

    @jax.jit
    def log_probs(tokens: jax.Array, edited: jax.Array) -> jax.Array:
        steered = {SITE: lambda x: x + jnp.asarray(push)[None, None] * edited[:, :, None].astype(x.dtype)}
        logits = writer.model.apply(writer.params, tokens, edit=steered).logits
        assert logits is not None
        return jax.nn.log_softmax(logits)

    parted = 0
    for trace, steered in zip(thought, whole, strict=True):
        new = list(trace.token_ids)
        text = writer.tokenizer.decode(new)
        assert "u" not in text or len(new) == 14
        ends = [n for n, token in enumerate(new) if "u" in writer.tokenizer.piece(token)]
        last = ends[0] if ends else len(new)
        assert tuple(new[: last + 1]) == steered.token_ids[: last + 1]
        row = np.zeros((1, 18), np.int32)
        row[0, : 4 + len(new)] = [*PROMPT, *new]
        # The token that ends thinking is read in the first pass without the edit.
        edited = np.arange(18)[None] < 4 + last
        own = np.asarray(log_probs(row, edited))[0, np.arange(3, 3 + len(new)), new]
        np.testing.assert_allclose(trace.log_probs, own, atol=1e-3)
        other = np.asarray(log_probs(row, np.ones((1, 18), bool)))[0, np.arange(3, 3 + len(new)), new]
        parted += bool(np.abs(trace.log_probs - other).max() > 0.05)
    assert parted >= 1
