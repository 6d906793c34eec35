"""Edits of a site that change latents of a dictionary and leave everything it does not explain as it is.

With codes `f` of an activation `x` and codes `g` after the change, every edit is

    x -> x + scale * (g - f) @ W_dec

which is the reconstruction from `g` plus the error term `x - SAE(x)`, without computing either. `scale` is 1,
or the token's standard deviation where the dictionary reads normalised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from mergelab.errors import SAEError
from mergelab.models.sites import Edit
from mergelab.sae.sae import Dictionary, layer_norm

__all__ = ["ablate", "add", "clamp", "edit_latents", "scale", "splice"]

Latents = int | Sequence[int] | Int[Array, " latents"]
Amounts = float | Sequence[float] | Float[Array, " latents"]
Where = Bool[Array, "batch length"] | None
Change = Callable[..., Array]


def ablate(dictionary: Dictionary, latents: Latents, *, where: Where = None) -> Edit:
    """Sets latents to 0: subtracts `f_i d_i` from the activation for each of them.

    Args:
        dictionary: of the site that the edit is used at.
        latents: which.
        where: the tokens to change, `[batch, length]`; all by default.

    Returns:
        An edit for `Model.apply` and `generate`. It holds arrays: other latents compile nothing anew.

    Raises:
        SAEError: a latent does not exist, or the dictionary does not reconstruct what it reads.
    """
    return edit_latents(dictionary, latents, _set, 0.0, where=where)


def clamp(dictionary: Dictionary, latents: Latents, values: Amounts, *, where: Where = None) -> Edit:
    """Sets latents to fixed values, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(dictionary, latents, _set, values, where=where)


def scale(dictionary: Dictionary, latents: Latents, factors: Amounts, *, where: Where = None) -> Edit:
    """Multiplies latents, which changes nothing where they are not active; as `ablate` otherwise."""
    return edit_latents(dictionary, latents, jnp.multiply, factors, where=where)


def add(dictionary: Dictionary, latents: Latents, amounts: Amounts, *, where: Where = None) -> Edit:
    """Adds to latents, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(dictionary, latents, jnp.add, amounts, where=where)


def edit_latents(
    dictionary: Dictionary, latents: Latents, change: Change, amounts: Amounts, *, where: Where = None
) -> Edit:
    """The edit that the others are made of.

    Args:
        dictionary: of the site that the edit is used at.
        latents: which, each once.
        change: `(codes [tokens, latents], amounts [1, latents]) -> codes`, jittable.
        amounts: one for all latents, or one for each.
        where: the tokens to change, `[batch, length]`; all by default.

    Raises:
        SAEError: a latent does not exist or is given twice, the amounts are not as many, or the dictionary
            does not reconstruct what it reads.
    """
    _check_reconstructs(dictionary)
    chosen = _checked_latents(dictionary, latents)
    given = jnp.atleast_1d(jnp.asarray(amounts, jnp.float32))
    if given.shape not in ((1,), chosen.shape):
        raise SAEError(
            f"{given.size} amounts were given for {chosen.size} latents; give one for all, or one for each."
        )
    return Partial(_changed, Partial(change), dictionary, chosen, given[None], where)


def splice(dictionary: Dictionary, *, error: bool = False) -> Edit:
    """Replaces an activation by its reconstruction.

    Args:
        dictionary: of the site that the edit is used at.
        error: add the error term `x - SAE(x)` as a constant. Values then stay what they are, but gradients
            pass through the dictionary alone, and can be taken with respect to its arrays (Marks et al. 2024,
            arXiv:2403.19647).

    Raises:
        SAEError: the dictionary does not reconstruct what it reads.
    """
    _check_reconstructs(dictionary)
    return Partial(_spliced_with_error if error else _spliced, dictionary)


def _changed(
    change: Change, dictionary: Dictionary, latents: Array, amounts: Array, where: Where, x: Array
) -> Array:
    rows = _rows(x)
    codes = dictionary.encode(rows)[:, latents]
    difference = change(codes, jnp.broadcast_to(amounts, codes.shape)) - codes
    if where is not None:
        difference = difference * where.reshape(-1, 1).astype(difference.dtype)
    added = difference @ dictionary.W_dec[latents]
    if dictionary.config.normalization == "layer_norm":
        added = added * layer_norm(rows)[2]
    return (rows + added).reshape(x.shape).astype(x.dtype)


def _spliced(dictionary: Dictionary, x: Array) -> Array:
    return dictionary(_rows(x)).reshape(x.shape).astype(x.dtype)


def _spliced_with_error(dictionary: Dictionary, x: Array) -> Array:
    rows = _rows(x)
    found = dictionary(rows)
    # (x - found) + found rounds; what is added to x here is 0, and carries the gradient of `found`.
    kept = jax.lax.stop_gradient(rows) + (found - jax.lax.stop_gradient(found))
    return kept.reshape(x.shape).astype(x.dtype)


def _set(codes: Array, amounts: Array) -> Array:
    return amounts.astype(codes.dtype)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _checked_latents(dictionary: Dictionary, latents: Any) -> Array:
    chosen = jnp.atleast_1d(jnp.asarray(latents, jnp.int32))
    if isinstance(chosen, Tracer):
        return chosen
    listed = chosen.tolist()
    outside = [latent for latent in listed if not 0 <= latent < dictionary.n_latents]
    if outside:
        raise SAEError(
            f"latent {outside[0]} does not exist: the dictionary has {dictionary.n_latents}, counted from 0."
        )
    if len(set(listed)) < len(listed):
        raise SAEError(f"latents {listed} name one of them twice; give each once.")
    return chosen


def _check_reconstructs(dictionary: Dictionary) -> None:
    if not dictionary.is_autoencoder or dictionary.config.sites != 1:
        kind = f"reads {dictionary.config.sites} sites" if dictionary.is_autoencoder else "is a transcoder"
        raise SAEError(
            f"the dictionary {kind} ({dictionary.mapping()}), {dictionary.d_in} wide to {dictionary.d_out}, "
            "so it does not reconstruct one site; edits need an autoencoder of that site."
        )
