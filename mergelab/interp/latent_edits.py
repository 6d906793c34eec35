"""Edits of a site that change latents of an SAE and leave everything it does not explain as it is.

With codes `f` of an activation `x` and codes `g` after the change, every edit is

    x -> x + scale * (g - f) @ W_dec

which is the reconstruction from `g` plus the error term `x - SAE(x)`, without computing either. `scale` is 1,
or the token's standard deviation where the SAE reads normalized tokens.
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
from mergelab.sae.sae import SAE, layer_norm

__all__ = ["ablate", "add", "clamp", "edit_latents", "scale", "splice"]

Latents = int | Sequence[int] | Int[Array, " latents"]
Amounts = float | Sequence[float] | Float[Array, " latents"]
Where = Bool[Array, "batch length"] | None
Change = Callable[..., Array]


def ablate(sae: SAE, latents: Latents, *, where: Where = None) -> Edit:
    """Sets latents to 0: subtracts `f_i d_i` from the activation for each of them.

    Args:
        sae: SAE of the site that the edit is used at.
        latents: indices of the latents.
        where: the tokens to change, `[batch, length]`; all by default.

    Returns:
        An edit for `Model.apply` and `generate`. It holds arrays: other latents compile nothing anew.

    Raises:
        SAEError: a latent does not exist, or the SAE does not reconstruct what it reads.
    """
    return edit_latents(sae, latents, _set, 0.0, where=where)


def clamp(sae: SAE, latents: Latents, values: Amounts, *, where: Where = None) -> Edit:
    """Sets latents to fixed values, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(sae, latents, _set, values, where=where)


def scale(sae: SAE, latents: Latents, factors: Amounts, *, where: Where = None) -> Edit:
    """Multiplies latents, which changes nothing where they are not active; as `ablate` otherwise."""
    return edit_latents(sae, latents, jnp.multiply, factors, where=where)


def add(sae: SAE, latents: Latents, amounts: Amounts, *, where: Where = None) -> Edit:
    """Adds to latents, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(sae, latents, jnp.add, amounts, where=where)


def edit_latents(
    sae: SAE, latents: Latents, change: Change, amounts: Amounts, *, where: Where = None
) -> Edit:
    """The edit that the others are made of.

    Args:
        sae: SAE of the site that the edit is used at.
        latents: indices of the latents, each once.
        change: `(codes [tokens, latents], amounts [1, latents]) -> codes`, jittable.
        amounts: one for all latents, or one for each.
        where: the tokens to change, `[batch, length]`; all by default.

    Raises:
        SAEError: a latent does not exist or is given twice, the amounts are not as many, or the SAE
            does not reconstruct what it reads.
    """
    _check_reconstructs(sae)
    chosen = _checked_latents(sae, latents)
    given = jnp.atleast_1d(jnp.asarray(amounts, jnp.float32))
    if given.shape not in ((1,), chosen.shape):
        raise SAEError(
            f"{given.size} amounts were given for {chosen.size} latents; give one for all, or one for each."
        )
    return Partial(_changed, Partial(change), sae, chosen, given[None], where)


def splice(sae: SAE, *, error: bool = False) -> Edit:
    """Replaces an activation by its reconstruction.

    Args:
        sae: SAE of the site that the edit is used at.
        error: add the error term `x - SAE(x)` as a constant. Values then stay what they are, but gradients
            pass through the SAE alone, and can be taken with respect to its arrays (Marks et al. 2024,
            arXiv:2403.19647).

    Raises:
        SAEError: the SAE does not reconstruct what it reads.
    """
    _check_reconstructs(sae)
    return Partial(_spliced_with_error if error else _spliced, sae)


def _changed(change: Change, sae: SAE, latents: Array, amounts: Array, where: Where, x: Array) -> Array:
    rows = _rows(x)
    codes = sae.encode(rows)[:, latents]
    difference = change(codes, jnp.broadcast_to(amounts, codes.shape)) - codes
    if where is not None:
        difference = difference * where.reshape(-1, 1).astype(difference.dtype)
    added = difference @ sae.W_dec[latents]
    if sae.config.normalization == "layer_norm":
        added = added * layer_norm(rows)[2]
    return (rows + added).reshape(x.shape).astype(x.dtype)


def _spliced(sae: SAE, x: Array) -> Array:
    return sae(_rows(x)).reshape(x.shape).astype(x.dtype)


def _spliced_with_error(sae: SAE, x: Array) -> Array:
    rows = _rows(x)
    found = sae(rows)
    # (x - found) + found rounds; what is added to x here is 0, and carries the gradient of `found`.
    kept = jax.lax.stop_gradient(rows) + (found - jax.lax.stop_gradient(found))
    return kept.reshape(x.shape).astype(x.dtype)


def _set(codes: Array, amounts: Array) -> Array:
    return amounts.astype(codes.dtype)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _checked_latents(sae: SAE, latents: Any) -> Array:
    chosen = jnp.atleast_1d(jnp.asarray(latents, jnp.int32))
    if isinstance(chosen, Tracer):
        return chosen
    listed = chosen.tolist()
    outside = [latent for latent in listed if not 0 <= latent < sae.n_latents]
    if outside:
        raise SAEError(f"latent {outside[0]} does not exist: the SAE has {sae.n_latents}, counted from 0.")
    if len(set(listed)) < len(listed):
        raise SAEError(f"latents {listed} name one of them twice; give each once.")
    return chosen


def _check_reconstructs(sae: SAE) -> None:
    if not sae.is_autoencoder or sae.config.sites != 1:
        kind = f"reads {sae.config.sites} sites" if sae.is_autoencoder else "is a transcoder"
        raise SAEError(
            f"the SAE {kind} ({sae.mapping()}), {sae.d_in} wide to {sae.d_out}, "
            "so it does not reconstruct one site; edits need an autoencoder of that site."
        )
