"""Cuts contexts into forward passes of one shape, and puts an SAE's reconstruction into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.sites import Edit
from mergelab.sae.sae import SAE
from mergelab.sae.subject_model import check_target

__all__ = [
    "anonymous",
    "encode",
    "encode_and_reconstruct",
    "mean_activation",
    "passes",
    "read_batches",
    "read_pairs",
    "splice",
    "splice_from",
]


def passes(tokens: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int]]:
    """`[contexts, length]` -> batches int32 `[batch, length]`, and how many of their rows are real.

    The last is filled up with its first row, so that all passes run one compiled program.
    """
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        filler = np.broadcast_to(part[:1], (batch - len(part), *part.shape[1:]))
        yield jnp.asarray(np.concatenate([part, filler]), jnp.int32), len(part)


def read_batches(
    source: ModelActivations, contexts: int | None = None, site: str | None = None
) -> Iterator[np.ndarray]:
    """Activations of one of the source's sites, pass by pass: float32 `[rows, d]`, rows in order.

    The first site, if none is named.
    """
    place = 0 if site is None else source.sites.index(site)
    for found in _read(source, contexts):
        yield found[place]


def read_pairs(
    sae: SAE, source: ModelActivations, contexts: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the SAE reads and what it is to reconstruct, pass by pass: float32 `[rows, d]` each.

    Raises:
        SAEError: the source has no activations of the site that the SAE writes.
    """
    place = source.sites.index(check_target(sae, source))
    for found in _read(source, contexts):
        yield found[0], found[place]


def _read(source: ModelActivations, contexts: int | None) -> Iterator[tuple[np.ndarray, ...]]:
    total, length = source.tokens.shape
    total = min(total, contexts or total)
    for start in range(0, total, source.batch):
        yield source.read_sites(start * length, min(start + source.batch, total) * length)


def mean_activation(
    source: ModelActivations, contexts: int | None = None, site: str | None = None
) -> np.ndarray:
    """The mean of one of the source's sites, the first if none is named, over the tokens: float64 `[d]`."""
    total, rows = np.zeros(source.widths[0 if site is None else source.sites.index(site)]), 0
    for x in read_batches(source, contexts, site):
        total, rows = total + x.sum(axis=0, dtype=np.float64), rows + len(x)
    return total / rows


def splice(sae: SAE) -> Edit:
    """An edit `[batch, length, d]` -> its reconstruction, in the activation's own dtype, for an autoencoder.

    Raises:
        SAEError: the SAE writes another activation than it reads (`splice_from`).
    """
    if not sae.is_autoencoder:
        raise SAEError(
            f"the SAE is a transcoder ({sae.mapping()}), so its output does not stand in for "
            "its input; splice it in where it writes (splice_from)."
        )
    return lambda x: splice_from(sae, x)(x)


def splice_from(sae: SAE, x: jax.Array) -> Edit:
    """The edit that puts the reconstruction from `x` into the site that the SAE writes.

    Args:
        sae: any; an autoencoder writes the site of `x`.
        x: `[batch, length, d_in]`, what the site it reads holds in the pass that is edited.

    Returns:
        An edit of `[batch, length, d_out]`, which keeps the dtype.
    """
    found = sae(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
    return lambda y: found.reshape(y.shape).astype(y.dtype)


def anonymous(sae: SAE) -> SAE:
    """The SAE without metadata: what differs in that alone shares compiled programs.

    An autoencoder writes what it reads wherever that is; a transcoder keeps the names of its sites.
    """
    config = replace(sae.config, metadata={})
    if sae.is_autoencoder and sae.target_known:
        config = replace(config, reads=None, writes=None, transcoder=False)
    return replace(sae, config=config)


@jax.jit
def encode(sae: SAE, x: jax.Array) -> jax.Array:
    """`[rows, d_in]` -> codes `[rows, n]`; one program for each shape and kind of SAE."""
    return sae.encode(x)


@jax.jit
def encode_and_reconstruct(sae: SAE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[rows, d_in]` -> codes `[rows, n]` and the reconstruction `[rows, d_out]`."""
    codes = sae.encode(x)
    return codes, sae.reconstruct(x, codes)
