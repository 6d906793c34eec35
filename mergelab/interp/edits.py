"""Edits of the ordinary day: add a direction to a site, remove something from it, put a value there.

Each returns a function of an activation for `Model.apply(edit={site: ...})` and `generate(edit=...)`. It
holds its arrays as a pytree (`jax.tree_util.Partial`), so that another direction or strength compiles
nothing anew.
"""

from __future__ import annotations

from typing import Any, overload

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mergelab.errors import SAEError, SiteError
from mergelab.interp import latent_edits
from mergelab.interp.latent_edits import Latents
from mergelab.interp.steering import SteeringVector, add_vector
from mergelab.interp.token_selection import (
    Columns,
    Generated,
    Tokens,
    chosen_tokens,
    in_columns,
    select_tokens,
)
from mergelab.models.sites import Edit
from mergelab.sae.sae import SAE

__all__ = ["ablate", "patch", "steer"]


def steer(
    direction: SteeringVector | Float[Array, " width"] | ArrayLike,
    strength: float | Array = 1.0,
    *,
    where: Tokens = None,
) -> Edit:
    """Adds a direction to a site of shape `[batch, length, width]`.

    Args:
        direction: a `SteeringVector`, such as `steering_vector` makes from prompts; or an array `[width]`,
            such as the decoder row `sae.W_dec[12]` of a latent.
        strength: factor of the direction; of a `SteeringVector` the length of what is added, in units of the
            mean norm of the activations. Negative strengths steer away. May be traced.
        where: tokens to change: bool `[batch, length]`, "prompt" or "generated"; all by default. In a
            generation a mask is one of the prompts' columns, and leaves new tokens as they are.

    Raises:
        SiteError: the direction is not one vector.
    """
    if isinstance(direction, SteeringVector):
        return direction.edit(strength, where=where)
    return add_vector(_vector(direction) * jnp.asarray(strength, jnp.float32), where=where)


@overload
def ablate(what: SAE, latents: Latents, *, where: Tokens = ...) -> Edit: ...


@overload
def ablate(what: SteeringVector | ArrayLike, latents: None = ..., *, where: Tokens = ...) -> Edit: ...


def ablate(
    what: SAE | SteeringVector | ArrayLike, latents: Latents | None = None, *, where: Tokens = None
) -> Edit:
    """Removes latents of an SAE, or the component along a direction, from a site.

    For latents, `f_i d_i` is subtracted from the activation, whose reconstruction error stays as it is; for a
    direction `r` of unit length, `x -> x - (x . r) r`.

    Args:
        what: an SAE of the site that the edit is used at; or a direction `[width]` of any length.
        latents: latents of the SAE to set to 0.
        where: tokens to change: bool `[batch, length]`, "prompt" or "generated"; all by default. In a
            generation a mask is one of the prompts' columns, and leaves new tokens as they are.

    Raises:
        SAEError: an SAE without latents, latents without an SAE, a latent that does not exist, or an SAE
            that does not reconstruct what it reads.
        SiteError: the direction is not one vector, or is zero.
    """
    if isinstance(what, SAE):
        if latents is None:
            raise SAEError("no latents were given to ablate; name them: ablate(sae, [3, 17]).")
        return latent_edits.ablate(what, latents, where=where)
    if latents is not None:
        raise SAEError(
            f"latents were given for a {type(what).__name__}; they belong to an SAE: ablate(sae, latents)."
        )
    direction = _vector(what.vector if isinstance(what, SteeringVector) else what)
    return Partial(_without, direction, select_tokens(where))


def patch(value: Float[Array, "batch length ..."] | ArrayLike, *, where: Tokens = None) -> Edit:
    """Puts a value in a site's place: activations of another prompt (`capture`), their mean, or zero.

    `mergelab.interp.patch_grid` tries every site and token in one compiled program.

    Args:
        value: array of the site's shape `[batch, length, ...]`, or one that broadcasts to it. In a generation
            its length is that of the prompts, and new tokens stay as they are.
        where: tokens to change: bool `[batch, length]`, "prompt" or "generated"; all by default. In a
            generation a mask is one of the prompts' columns, and leaves new tokens as they are.

    Returns:
        An edit that raises `SiteError` when the value does not fit the site it is used at.
    """
    return Partial(_replaced, jnp.asarray(value, jnp.float32), select_tokens(where))


def _vector(direction: ArrayLike) -> Float[Array, " width"]:
    vector = jnp.asarray(direction, jnp.float32)
    if vector.ndim != 1:
        raise SiteError(f"a direction has shape {list(vector.shape)}; expected one vector [width].")
    return vector


def _without(
    direction: Array,
    where: Any,
    x: Array,
    columns: Columns = None,
    generated: Generated = None,
) -> Array:
    unit = direction / jnp.linalg.norm(direction)
    along = jnp.einsum("...w,w->...", x.astype(jnp.float32), unit, precision="highest")
    removed = x.astype(jnp.float32) - along[..., None] * jnp.broadcast_to(unit, x.shape)
    return _at(chosen_tokens(where, x.shape, columns, generated), removed, x)


def _replaced(
    value: Array,
    where: Any,
    x: Array,
    columns: Columns = None,
    generated: Generated = None,
) -> Array:
    chosen = chosen_tokens(where, x.shape, columns, generated)
    rest = [*range(2, x.ndim)] if value.ndim == x.ndim else [*range(x.ndim - value.ndim, x.ndim)]
    lined_up = value.ndim <= x.ndim and all(
        size in (1, x.shape[axis]) for size, axis in zip(value.shape[::-1], rest[::-1], strict=False)
    )
    if lined_up and value.ndim == x.ndim:
        placed = in_columns(value, x.shape, columns)
        lined_up = placed is not None
        if placed is not None and value.shape[1] > 1:
            value, there = placed
            chosen = there if chosen is None else chosen & there
    if not lined_up:
        raise SiteError(
            f"a value of shape {list(value.shape)} cannot take the place of an activation of shape "
            f"{list(x.shape)}; capture it on prompts of the same number and length."
        )
    return _at(
        chosen, jnp.broadcast_to(value.reshape((1,) * (x.ndim - value.ndim) + value.shape), x.shape), x
    )


def _at(where: Array | None, changed: Array, x: Array) -> Array:
    changed = changed.astype(x.dtype)
    if where is None:
        return changed
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), changed, x)
