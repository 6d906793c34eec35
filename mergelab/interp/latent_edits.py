"""Edits of a site that change latents of an SAE and leave everything it does not explain as it is.

With codes `f` of an activation `x` and codes `g` after the change, every edit is

    x -> x + scale * (g - f) @ W_dec

which is the reconstruction from `g` plus the error term `x - SAE(x)`, without computing either. `scale` is 1,
or the token's standard deviation where the SAE reads normalized tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Float, Int

from mergelab.activations.model_activations import side_by_side
from mergelab.errors import SAEError
from mergelab.interp.token_selection import Columns, Generated, Tokens, chosen_tokens, select_tokens
from mergelab.models.sites import Edit
from mergelab.sae.normalizations import normalized
from mergelab.sae.sae import SAE
from mergelab.sae.splice import check_reconstructs, token_rows, where_kept
from mergelab.sae.splice import splice as splice_everywhere

__all__ = ["ablate", "add", "clamp", "edit_latents", "scale", "splice"]

Latents = int | Sequence[int] | Int[Array, " latents"]
Amounts = float | Sequence[float] | Float[Array, " latents"]
Change = Callable[..., Array]


def ablate(sae: SAE, latents: Latents, *, where: Tokens = None) -> Edit:
    """Sets latents to 0: subtracts `f_i d_i` from the activation for each of them.

    Args:
        sae: SAE of the site that the edit is used at.
        latents: indices of the latents.
        where: tokens to change, as in `mergelab.interp.steer`; all by default.

    Returns:
        An edit for `Model.apply` and `generate`. It holds arrays: other latents compile nothing anew.

    Raises:
        SAEError: a latent does not exist, or the SAE does not reconstruct what it reads.
    """
    return edit_latents(sae, latents, _set, 0.0, where=where)


def clamp(sae: SAE, latents: Latents, values: Amounts, *, where: Tokens = None) -> Edit:
    """Sets latents to fixed values, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(sae, latents, _set, values, where=where)


def scale(sae: SAE, latents: Latents, factors: Amounts, *, where: Tokens = None) -> Edit:
    """Multiplies latents, which changes nothing where they are not active; as `ablate` otherwise."""
    return edit_latents(sae, latents, jnp.multiply, factors, where=where)


def add(sae: SAE, latents: Latents, amounts: Amounts, *, where: Tokens = None) -> Edit:
    """Adds to latents, whether they are active or not; as `ablate` otherwise."""
    return edit_latents(sae, latents, jnp.add, amounts, where=where)


def splice(sae: SAE, *, error: bool = False, where: Tokens = None) -> Edit:
    """Replaces an activation by its reconstruction.

    Args:
        sae: SAE of the site that the edit is used at.
        error: whether the error term is added as a constant (`mergelab.sae.splice`).
        where: tokens to change, as in `mergelab.interp.steer`; all by default. Attention sinks, such as the
            first token, are best left as they are: no SAE that was trained without them reconstructs them.

    Raises:
        SAEError: the SAE does not reconstruct what it reads.
    """
    edit = splice_everywhere(sae, error=error)
    return edit if where is None else Partial(_at_tokens, edit, select_tokens(where))


def _at_tokens(
    edit: Edit, where: Any, x: Array, columns: Columns = None, generated: Generated = None
) -> Array:
    tokens = chosen_tokens(where, x.shape, columns, generated)
    return edit(x) if tokens is None else where_kept(tokens, side_by_side(edit(x)), x)


def edit_latents(
    sae: SAE, latents: Latents, change: Change, amounts: Amounts, *, where: Tokens = None
) -> Edit:
    """The edit that the others are made of.

    Args:
        sae: SAE of the site that the edit is used at.
        latents: indices of the latents, each once.
        change: `(codes [tokens, latents], amounts [1, latents]) -> codes`, jittable.
        amounts: one for all latents, or one for each.
        where: tokens to change, as in `mergelab.interp.steer`; all by default.

    Raises:
        SAEError: a latent does not exist or is given twice, the amounts are not as many, or the SAE
            does not reconstruct what it reads.
    """
    check_reconstructs(sae)
    chosen = _checked_latents(sae, latents)
    given = jnp.atleast_1d(jnp.asarray(amounts, jnp.float32))
    if given.shape not in ((1,), chosen.shape):
        raise SAEError(
            f"{given.size} amounts were given for {chosen.size} latents; give one for all, or one for each."
        )
    return Partial(_changed, Partial(change), sae, chosen, given[None], select_tokens(where))


def _changed(
    change: Change,
    sae: SAE,
    latents: Array,
    amounts: Array,
    where: Any,
    x: Array,
    columns: Columns = None,
    generated: Generated = None,
) -> Array:
    rows = token_rows(x)
    codes = sae.encode(rows)[:, latents]
    difference = change(codes, jnp.broadcast_to(amounts, codes.shape)) - codes
    tokens = chosen_tokens(where, x.shape, columns, generated)
    if tokens is not None:
        difference = difference * tokens.reshape(-1, 1).astype(difference.dtype)
    added = difference @ sae.W_dec[latents]
    scale = normalized(sae.config.normalization, rows)[2]
    if scale is not None:
        added = added * scale
    return (rows + added).reshape(x.shape).astype(x.dtype)


def _set(codes: Array, amounts: Array) -> Array:
    return amounts.astype(codes.dtype)


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
