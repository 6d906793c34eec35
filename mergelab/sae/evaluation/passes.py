"""Cuts contexts into forward passes of one shape, and puts a dictionary's reconstruction into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.models.sites import Edit
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.model_source import ModelActivations

__all__ = [
    "anonymous",
    "encode",
    "encode_and_reconstruct",
    "mean_activation",
    "passes",
    "read_batches",
    "splice",
]


def passes(tokens: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int]]:
    """`[contexts, length]` -> batches int32 `[batch, length]`, and how many of their rows are real.

    The last is filled up with its first row, so that all passes run one compiled program.
    """
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        filler = np.broadcast_to(part[:1], (batch - len(part), *part.shape[1:]))
        yield jnp.asarray(np.concatenate([part, filler]), jnp.int32), len(part)


def read_batches(source: ModelActivations, contexts: int | None = None) -> Iterator[np.ndarray]:
    """Activations of the source's first site, pass by pass: float32 `[rows, d]`, rows in order."""
    total, length = source.tokens.shape
    total = min(total, contexts or total)
    for start in range(0, total, source.batch):
        yield source.read_sites(start * length, min(start + source.batch, total) * length)[0]


def mean_activation(source: ModelActivations, contexts: int | None = None) -> np.ndarray:
    """The mean of the source's first site over the tokens: float64 `[d]`."""
    total, rows = np.zeros(source.widths[0]), 0
    for x in read_batches(source, contexts):
        total, rows = total + x.sum(axis=0, dtype=np.float64), rows + len(x)
    return total / rows


def splice(dictionary: Dictionary) -> Edit:
    """An edit `[batch, length, d]` -> its reconstruction, in the activation's own dtype."""

    def reconstruct(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return dictionary(rows).reshape(x.shape).astype(x.dtype)

    return reconstruct


def anonymous(dictionary: Dictionary) -> Dictionary:
    """The dictionary without metadata: what differs in that alone shares compiled programs."""
    return replace(dictionary, config=replace(dictionary.config, metadata={}))


@jax.jit
def encode(dictionary: Dictionary, x: jax.Array) -> jax.Array:
    """`[rows, d_in]` -> codes `[rows, n]`; one program for each shape and kind of dictionary."""
    return dictionary.encode(x)


@jax.jit
def encode_and_reconstruct(dictionary: Dictionary, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[rows, d_in]` -> codes `[rows, n]` and the reconstruction `[rows, d_out]`."""
    codes = dictionary.encode(x)
    return codes, dictionary.reconstruct(x, codes)
