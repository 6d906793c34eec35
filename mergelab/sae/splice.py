"""Cuts contexts into forward passes of one shape, and puts an SAE's reconstruction into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.kept import short_enough
from mergelab.activations.model_activations import ModelActivations, side_by_side
from mergelab.errors import SAEError
from mergelab.models.sites import Edit
from mergelab.sae.sae import SAE
from mergelab.sae.subject_model import check_reads, check_target

__all__ = [
    "anonymous",
    "check_reconstructs",
    "encode",
    "encode_and_reconstruct",
    "encode_batches",
    "hold_at",
    "kept_in_pass",
    "limits_of",
    "mean_activation",
    "place_batches",
    "read_batches",
    "read_pairs",
    "read_passes",
    "splice",
    "splice_from",
    "token_batches",
    "token_rows",
    "where_kept",
]


def token_batches(tokens: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int]]:
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
    """Activations of one of the source's sites that count, pass by pass: float32 `[rows, d]`, in order.

    The first site, if none is named.
    """
    place = 0 if site is None else source.sites.index(site)
    for found, kept in read_passes(source, contexts):
        yield found[place] if kept.all() else found[place][kept]


def encode_batches(
    sae: SAE, source: ModelActivations, contexts: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes of the source's first site and which tokens count, pass by pass, rows in order.

    Float32 `[rows, n]`, 0 at tokens that do not count, and bool `[rows]`.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    check_reads(sae, source)
    rows = source.batch * source.tokens.shape[1]
    for (x, *_), kept in read_passes(source, contexts):
        filled = np.pad(x, ((0, rows - len(x)), (0, 0)))  # one shape, one program
        codes = np.asarray(encode(sae, jnp.asarray(filled)))[: len(x)]
        yield codes if kept.all() else np.where(kept[:, None], codes, np.float32(0)), kept


def read_pairs(
    sae: SAE, source: ModelActivations, contexts: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the SAE reads and what it is to reconstruct, pass by pass, and which tokens count.

    Float32 `[rows, d]` each, and bool `[rows]`.

    Raises:
        SAEError: the source has no activations of the site that the SAE writes.
    """
    place = source.sites.index(check_target(sae, source))
    for found, kept in read_passes(source, contexts):
        yield found[0], found[place], kept


def read_passes(
    source: ModelActivations, contexts: int | None = None
) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """Activations of every site, pass by pass, `[rows, d]` each, and which tokens count, bool `[rows]`."""
    total, length = source.tokens.shape
    total = min(total, contexts or total)
    for start in range(0, total, source.batch):
        found = source.read_sites(start * length, min(start + source.batch, total) * length)
        yield found, source.kept_among(found, start * length)


def limits_of(source: ModelActivations) -> Array:
    """The largest norm of a token that counts, of each site: float32 `[sites]`, for `kept_in_pass`."""
    return jnp.asarray(source.norm_limits, jnp.float32)


def place_batches(source: ModelActivations, contexts: int | None = None) -> Iterator[Array]:
    """`ModelActivations.by_place`, bool `[batch, length]`, in the batches of `token_batches`."""
    for start in range(0, len(source.tokens[:contexts]), source.batch):
        part = source.by_place[:contexts][start : start + source.batch]
        filler = np.broadcast_to(part[:1], (source.batch - len(part), *part.shape[1:]))
        yield jnp.asarray(np.concatenate([part, filler]))


def kept_in_pass(
    captured: Mapping[str, Array], sites: Sequence[str], limits: Array, by_place: Array
) -> Array:
    """Which tokens of a pass count: bool `[batch, length]`, jittable.

    Args:
        captured: what the sites hold, `[batch, length, d]` each.
        sites: those whose norms decide.
        limits: largest norms (`limits_of`), `[sites]`.
        by_place: tokens that count by their place and id, bool `[batch, length]`.
    """
    for number, site in enumerate(sites):
        by_place = by_place & short_enough(side_by_side(captured[site]), limits[number])
    return by_place


def where_kept(kept: Array, new: Array, old: Array) -> Array:
    """`new` at tokens that count and `old` at others, in the shape and dtype of `old`.

    Args:
        kept: bool `[batch, length]`.
        new: `[batch, length, d]`, with heads side by side, or what broadcasts to that.
        old: `[batch, length, ...]`, what a site holds.
    """
    flat = side_by_side(old)
    there = jnp.broadcast_to(new, flat.shape).astype(old.dtype)
    return jnp.where(kept[..., None], there, flat).reshape(old.shape)


def hold_at(kept: Array, value: Array | float) -> Edit:
    """The edit that puts one vector `[d]`, or one number, at tokens that count: an ablation.

    `kept` is bool `[batch, length]`; the other tokens stay as they are.
    """
    new = jnp.asarray(value, jnp.float32).reshape(1, 1, -1)
    return lambda y: where_kept(kept, new, y)


def mean_activation(
    source: ModelActivations, contexts: int | None = None, site: str | None = None
) -> np.ndarray:
    """The mean of one of the source's sites, the first if none is named, over the tokens that count.

    Float64 `[d]`.

    Raises:
        SAEError: no token counts.
    """
    total, rows = np.zeros(source.widths[0 if site is None else source.sites.index(site)]), 0
    for x in read_batches(source, contexts, site):
        total, rows = total + x.sum(axis=0, dtype=np.float64), rows + len(x)
    if not rows:
        raise SAEError(
            "no token of the text counts by the rule for tokens (skip_positions, skip_special, "
            "max_norm_multiple); relax it, or give longer contexts."
        )
    return total / rows


def splice(sae: SAE, *, error: bool = False) -> Edit:
    """Replaces an activation by its reconstruction.

    Args:
        sae: autoencoder of the site that the edit is used at.
        error: add the error term `x - SAE(x)` as a constant. Values then stay what they are, but gradients
            pass through the SAE alone, and can be taken with respect to its arrays (Marks et al. 2024,
            arXiv:2403.19647).

    Raises:
        SAEError: the SAE does not reconstruct what it reads.
    """
    check_reconstructs(sae)
    return Partial(_spliced_with_error if error else _spliced, sae)


def check_reconstructs(sae: SAE) -> None:
    """Checks that the SAE reconstructs the one site that it reads, as edits of that site need.

    Raises:
        SAEError: it does not.
    """
    if not sae.is_autoencoder or sae.config.sites != 1:
        kind = f"reads {sae.config.sites} sites" if sae.is_autoencoder else "is a transcoder"
        raise SAEError(
            f"the SAE {kind} ({sae.mapping()}), {sae.d_in} wide to {sae.d_out}, "
            "so it does not reconstruct one site; edits need an autoencoder of that site."
        )


def token_rows(x: Array) -> Array:
    """What a site holds, token by token: float32 `[rows, d]`, where it has heads with them side by side."""
    flat = side_by_side(x)
    return flat.reshape(-1, flat.shape[-1]).astype(jnp.float32)


def _spliced(sae: SAE, x: Array) -> Array:
    return sae(token_rows(x)).reshape(x.shape).astype(x.dtype)


def _spliced_with_error(sae: SAE, x: Array) -> Array:
    rows = token_rows(x)
    found = sae(rows)
    # (x - found) + found rounds; what is added to x here is 0, and carries the gradient of `found`.
    kept = jax.lax.stop_gradient(rows) + (found - jax.lax.stop_gradient(found))
    return kept.reshape(x.shape).astype(x.dtype)


def splice_from(sae: SAE, x: jax.Array, kept: jax.Array | None = None) -> Edit:
    """The edit that puts the reconstruction from `x` into the site that the SAE writes.

    Args:
        sae: any SAE; an autoencoder writes the site of `x`.
        x: `[batch, length, d_in]` or with heads, what the site it reads holds in the pass that is edited.
        kept: bool `[batch, length]`, the tokens that are changed; all by default.

    Returns:
        An edit of `[batch, length, d_out]` or with heads, which keeps the dtype.
    """
    found = sae(token_rows(x))
    if kept is None:
        return lambda y: found.reshape(y.shape).astype(y.dtype)
    return lambda y: where_kept(kept, found.reshape(*kept.shape, -1), y)


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
