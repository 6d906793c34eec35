"""Bits per byte against closed forms."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from mergelab.quickstart.family import bits_per_byte, summed_loss
from mergelab.text.packing import evaluation_windows

VOCABULARY = 16
DOCUMENTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
TOKENS = sum(map(len, DOCUMENTS))


def uniform(params: Array, tokens: Array) -> Array:
    return jnp.zeros((*tokens.shape, VOCABULARY)) + params


def successor(params: Array, tokens: Array) -> Array:
    """Gives `tokens + 1` the probability `p / (p + 15)` for `params = ln p`."""
    hit = jnp.arange(VOCABULARY)[None, None, :] == tokens[:, :, None] + 1
    return jnp.where(hit, params, 0.0)


@pytest.mark.parametrize("length", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_a_uniform_model_costs_log2_of_the_vocabulary_a_token(length: int, batch: int) -> None:
    windows = evaluation_windows(DOCUMENTS, 0, length, num_bytes=5)
    found = bits_per_byte(summed_loss(uniform), jnp.float32(3.0), windows, batch)
    assert found == pytest.approx(TOKENS * math.log2(VOCABULARY) / 5, rel=1e-6)


def test_a_model_that_knows_the_rule_is_charged_for_what_it_misses() -> None:
    windows = evaluation_windows(DOCUMENTS, 0, 3, num_bytes=7)
    p = 100.0
    found = bits_per_byte(summed_loss(successor), jnp.float32(math.log(p)), windows)
    # All tokens follow their predecessor but 8 and 9, which begin documents.
    hit, miss = -math.log2(p / (p + 15)), -math.log2(1 / (p + 15))
    assert found == pytest.approx(((TOKENS - 2) * hit + 2 * miss) / 7, rel=1e-5)


def test_padding_is_not_counted() -> None:
    windows = evaluation_windows(DOCUMENTS, 0, 8, num_bytes=5)
    everything = type(windows)(windows.tokens, np.ones_like(windows.is_target), 5)
    loss = summed_loss(uniform)
    assert bits_per_byte(loss, jnp.float32(0), everything) > 2 * bits_per_byte(loss, jnp.float32(0), windows)
