"""Steering: adds a vector to a site while the model runs, and makes such vectors from two sets of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from mergelab.activations.capture import capture, check_prompts
from mergelab.activations.kept import DEFAULT_RULE, TokenRule, median_norm, row_norms
from mergelab.compat import register_dataclass
from mergelab.errors import SAEError, SiteError
from mergelab.interp.token_selection import Columns, Generated, Tokens, chosen_tokens, select_tokens
from mergelab.interp.vectors import mean_difference, mean_norm, principal_difference, with_strength
from mergelab.models.model import Model, Params
from mergelab.models.sites import Edit
from mergelab.sae.sae import SAE

__all__ = ["SteeringVector", "add_vector", "latent_direction", "steering_vector"]


@register_dataclass
@dataclass(frozen=True)
class SteeringVector:
    """A direction at a site, and the length of what is usually there.

    Attributes:
        vector: float32 `[width]`, of any length.
        norm: mean length of the activations it was made from, attention sinks left out. A strength near 0.1
            is where to begin on a language model.
        site: name of the site, where it is known.
        model_type: family of the model that it was made for, where it is known.
    """

    vector: Float[Array, " width"]
    norm: Float[Array, ""]
    site: str = field(default="", metadata={"static": True})
    model_type: str = field(default="", metadata={"static": True})

    def edit(self, strength: Any, *, where: Tokens = None) -> Edit:
        """Adds the direction at length `strength * norm`; a negative strength steers away.

        Args:
            strength: multiple of the mean activation norm; may be traced.
            where: tokens to change, as in `mergelab.interp.steer`; all by default.
        """
        return add_vector(with_strength(self.vector, strength, self.norm), where=where)


def add_vector(vector: Float[Array, " width"], *, where: Tokens = None) -> Edit:
    """An edit `x -> x + vector` at every token, or at those where `where` is True.

    It holds arrays, so that another vector of the same width compiles nothing anew.
    """
    return Partial(_added, jnp.asarray(vector, jnp.float32), select_tokens(where))


def steering_vector(
    model: Model,
    params: Params,
    site: str,
    positive: Any,
    negative: Any,
    *,
    masks: tuple[Any, Any] = (None, None),
    position: int | None = -1,
    method: Literal["mean", "pca"] = "mean",
    batch: int = 32,
    rule: TokenRule = DEFAULT_RULE,
    special_ids: Sequence[int] = (),
) -> SteeringVector:
    """A steering vector from what a site holds on two sets of prompts.

    Args:
        model: the model.
        params: its parameters.
        site: site of shape `[batch, length, width]`.
        positive: tokens `[prompts, length]` of what to steer towards.
        negative: tokens of what to steer away from; for `pca`, the counterpart of each row of `positive`.
        masks: True for real tokens, for each set.
        position: position of the token to read in each prompt; -1 is the last real one, None all of them that
            count.
        method: `mean` of the differences (contrastive activation addition, arXiv:2312.06681), or their first
            principal axis (arXiv:2310.01405).
        batch: prompts in one pass.
        rule: which tokens count where all are read: the first of each prompt does not, nor do special tokens
            and attention sinks, which are many times as long as other tokens.
        special_ids: ids of special tokens, such as `tokenizer.special_ids`.

    Raises:
        SiteError: the site is not a stream of vectors, or the sets do not pair up for `pca`.
    """
    if len(model.sites().get(site, (0, 0, 0))) != 3:
        raise SiteError(
            f"the site {site!r} has shape {list(model.sites()[site])}; a vector is added to [batch, length, "
            "width]."
        )
    held, real, ordinary = [], [], []
    for tokens, mask in zip((positive, negative), masks, strict=True):
        tokens, there = check_prompts(model, tokens, mask)
        held.append(capture(model, params, tokens, site, mask=there, position=position, batch=batch)[site])
        real.append(there)
        special = np.isin(tokens, special_ids) if rule.skip_special and len(special_ids) else ~there
        ordinary.append(there & ~special)
    if position is None:
        kept = _counted(held, real, ordinary, rule, paired=method == "pca")
        held = [rows[there] for rows, there in zip(held, kept, strict=True)]
    read = [jnp.asarray(rows) for rows in held]
    vector = (mean_difference if method == "mean" else principal_difference)(read[0], read[1])
    return SteeringVector(vector, mean_norm(jnp.concatenate(read)), site, model.family.model_type)


def _counted(
    held: list[np.ndarray],
    real: list[np.ndarray],
    ordinary: list[np.ndarray],
    rule: TokenRule,
    *,
    paired: bool,
) -> list[np.ndarray]:
    """Which tokens of the two sets count, bool `[prompts, length]` each.

    A set in which no ordinary token stands behind the positions that are skipped keeps what it has. Of pairs
    both count or neither does.
    """
    kept = []
    for there, plain in zip(real, ordinary, strict=True):
        later = plain & (np.cumsum(there, axis=1) > rule.skip_positions)
        kept.append(later if later.any() else plain if plain.any() else there)
    norms = [np.linalg.norm(rows, axis=-1) for rows in held]
    pooled = np.concatenate([lengths[there] for lengths, there in zip(norms, kept, strict=True)])
    limit = rule.norm_limit(median_norm(pooled))
    kept = [there & ~(lengths > limit) for lengths, there in zip(norms, kept, strict=True)]
    if paired and kept[0].shape == kept[1].shape and (real[0] == real[1]).all():
        both = kept[0] & kept[1]
        kept = [both, both]
    return kept


def latent_direction(
    sae: SAE, latent: int, activations: Any, *, rule: TokenRule = DEFAULT_RULE
) -> SteeringVector:
    """The decoder row of a latent, as a steering vector.

    Args:
        sae: writes the site that is steered: for a transcoder not the one it reads.
        latent: index of the latent.
        activations: `[rows, width]` at the site, to measure their mean length.
        rule: `max_norm_multiple` of it leaves attention sinks out of that mean.

    Raises:
        SAEError: there is no such latent, or the activations are of another width than it writes.
    """
    if not 0 <= latent < sae.n_latents:
        raise SAEError(f"latent {latent} does not exist: the SAE has {sae.n_latents}.")
    vector = jnp.asarray(sae.W_dec[latent], jnp.float32)
    rows = np.asarray(activations, np.float32)
    if rows.shape[-1:] != vector.shape:
        raise SAEError(
            f"activations are {rows.shape[-1]} wide, but the SAE ({sae.mapping()}) writes "
            f"{sae.d_out}; give those of the site it writes."
        )
    norms = row_norms(rows.reshape(-1, rows.shape[-1]))
    kept = ~(norms > rule.norm_limit(median_norm(norms)))
    return SteeringVector(vector, mean_norm(jnp.asarray(rows.reshape(-1, rows.shape[-1])[kept])))


def _added(
    vector: Array,
    where: Any,
    x: Array,
    columns: Columns = None,
    generated: Generated = None,
) -> Array:
    added = jnp.broadcast_to(vector, x.shape)
    chosen = chosen_tokens(where, x.shape, columns, generated)
    if chosen is not None:
        added = added * chosen[..., None].astype(jnp.float32)
    return (x.astype(jnp.float32) + added).astype(x.dtype)
