"""Recurrences in chunks and token by token are a plain loop over time in float64, with padding anywhere."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mergelab.models.layers.linear_recurrence import CHUNK, read_memory
from mergelab.models.layers.selective_scan import selective_scan
from mergelab.models.layers.short_convolution import convolve

LENGTH = CHUNK + 9  # two chunks, of which the second is filled up
REAL = np.random.default_rng(5).random((2, LENGTH)) > 0.2


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def memory_inputs() -> list[np.ndarray]:
    """Queries, keys, values, decays, memory and strengths of two groups of three heads."""
    query, key = random(1, 2, LENGTH, 2, 4), random(2, 2, LENGTH, 2, 4)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value, decay = random(3, 2, LENGTH, 6, 3), -np.exp(random(4, 2, LENGTH, 6))
    return [query, key, value, decay, random(6, 2, 6, 4, 3), 1 / (1 + np.exp(-random(7, 2, LENGTH, 6)))]


def memory_loop(delta: bool, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    query, key, value, decay, memory, strength = (x.astype(np.float64) for x in memory_inputs())
    read, memory = np.zeros(value.shape), memory.copy()
    for b, t, h in np.ndindex(*value.shape[:3]):
        if not real[b, t]:
            continue
        k, q, v = key[b, t, h // 3], query[b, t, h // 3], value[b, t, h]
        state = np.exp(decay[b, t, h]) * memory[b, h]
        written = strength[b, t, h] * (v - k @ state) if delta else v
        memory[b, h] = state + np.outer(k, written)
        read[b, t, h] = q @ memory[b, h]
    return read, memory


def pieces(step: Any, length: int, state: Any) -> tuple[np.ndarray, Any]:
    """Tokens one by one, each with the state that the one before it left."""
    found = []
    for t in range(length):
        read, state = step(t, state)
        found.append(np.asarray(read))
    return np.concatenate(found, axis=1), state


@pytest.mark.parametrize("delta", [False, True])
def test_a_memory_in_chunks_and_by_steps_is_that_of_a_loop(delta: bool) -> None:
    *tokens, memory, strength = memory_inputs()
    strengths = strength if delta else None
    run = jax.jit(read_memory)
    expected, last = memory_loop(delta, REAL)
    read, after = run(*tokens, memory, REAL, strengths)
    np.testing.assert_allclose(np.asarray(read)[REAL], expected[REAL], rtol=0, atol=2e-5)
    np.testing.assert_allclose(after, last, rtol=0, atol=2e-5)

    def step(t: int, memory: np.ndarray) -> Any:
        one = np.s_[:, t : t + 1]
        return run(*(x[one] for x in tokens), memory, REAL[one], strength[one] if delta else None)

    read, after = pieces(step, LENGTH, memory)
    np.testing.assert_allclose(read[REAL], expected[REAL], rtol=0, atol=2e-5)
    np.testing.assert_allclose(after, last, rtol=0, atol=2e-5)
    # Controls: without decay, and with the other rule, the comparison fails.
    faded = run(*tokens[:3], 0 * tokens[3], memory, REAL, strengths)[0]
    assert np.abs(np.asarray(faded)[REAL] - expected[REAL]).max() > 0.1
    assert np.abs(memory_loop(not delta, REAL)[0][REAL] - expected[REAL]).max() > 0.1


def test_a_selective_scan_in_chunks_and_by_steps_is_that_of_a_loop() -> None:
    tokens = [random(1, 2, LENGTH, 5), np.exp(random(2, 2, LENGTH, 5) - 1), -np.exp(random(3, 5, 4))]
    tokens += [random(4, 2, LENGTH, 4), random(5, 2, LENGTH, 4)]
    first = random(6, 2, 5, 4)
    x, step, rate, into, out, memory = (y.astype(np.float64) for y in (*tokens, first))
    expected = np.zeros(x.shape)
    for b, t in zip(*np.nonzero(REAL), strict=True):
        moved = np.exp(step[b, t, :, None] * rate) * memory[b]
        memory[b] = moved + (step[b, t] * x[b, t])[:, None] * into[b, t][None]
        expected[b, t] = memory[b] @ out[b, t]
    run = jax.jit(selective_scan)
    read, after = run(*tokens, first, REAL)
    np.testing.assert_allclose(np.asarray(read)[REAL], expected[REAL], rtol=0, atol=2e-5)
    np.testing.assert_allclose(after, memory, rtol=0, atol=2e-5)

    def one(t: int, memory: np.ndarray) -> Any:
        at = np.s_[:, t : t + 1]
        x, step, rate, into, out = tokens
        return run(x[at], step[at], rate, into[at], out[at], memory, REAL[at])

    read, after = pieces(one, LENGTH, first)
    np.testing.assert_allclose(read[REAL], expected[REAL], rtol=0, atol=2e-5)
    np.testing.assert_allclose(after, memory, rtol=0, atol=2e-5)
    assert (
        np.abs(np.asarray(run(*tokens, 0 * first, REAL)[0])[REAL] - expected[REAL]).max() > 0.1
    )  # a control


def test_a_convolution_sees_the_latest_real_tokens_wherever_padding_stands() -> None:
    x, window, kernel = random(1, 2, LENGTH, 3), random(2, 2, 3, 3), random(3, 4, 3)
    run = jax.jit(convolve)
    y, after = run(x, window, kernel, REAL)
    for b in range(2):
        real = np.concatenate([window[b], x[b, REAL[b]]]).astype(np.float64)
        expected = sum(kernel[j] * real[j : len(real) - 3 + j] for j in range(4))
        np.testing.assert_allclose(np.asarray(y)[b, REAL[b]], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(after[b], real[-3:], rtol=0, atol=1e-6)
    plain, _ = run(x, window, kernel)
    np.testing.assert_allclose(plain, run(x, window, kernel, np.ones_like(REAL))[0], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(plain - y)[REAL]).max() > 0.1
