"""The same removal while a model runs, as edits of its sites; and the opposite, which adds a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float

from mergelab.interp.abliteration.ablation import Ablation
from mergelab.interp.abliteration.weights import check_ablation, writer_terms
from mergelab.models.model import Model
from mergelab.models.residual_stream import writers
from mergelab.models.sites import Edit
from mergelab.models.table import get_leaf

__all__ = ["ablate", "induce"]

_SITES = {"attention": "attn", "mlp": "mlp"}


def ablate(model: Model, params: Mapping[str, Any], ablation: Ablation) -> dict[str, Edit]:
    """Edits for `Model.apply` and `generate` that take the directions out of everything that is written.

    Logits equal those of `abliterate_params` up to rounding, except where a tied embedding is edited: as the
    output embedding it loses the direction too, and no site lies between the last norm and the logits. There
    the two differ by `(h . r) (E r)`, `h` being the normalised last stream.

    Args:
        model: a decoder.
        params: its parameters, of which only the gains of sandwich blocks are looked at.
        ablation: what is removed, and where.

    Returns:
        Edits by site; they hold arrays, so that another ablation of the same model compiles nothing anew.

    Raises:
        MergelabError: the model is an encoder, or the ablation does not fit it.
    """
    check_ablation(model, ablation)
    edits: dict[str, Edit] = {}
    for writer in writers(model):
        place = "embed" if writer.layer is None else f"blocks.{writer.layer}.{_SITES[writer.component]}.out"
        if place in edits:
            continue
        gain = None if writer.gain is None else get_leaf(params, writer.gain)
        direction, weight = writer_terms(model, writer, ablation, gain)
        if gain is None:
            edits[place] = Partial(_remove, direction, weight)
        else:
            scale = gain.astype(jnp.float32) + model.config.norm.offset
            edits[place] = Partial(_remove_before_norm, direction, weight, scale)
    return edits


def induce(vectors: Float[Array, "layers width"]) -> dict[str, Edit]:
    """Edits that add `vectors[i]` to the stream before block `i`, at every token.

    With the raw difference of means at one layer, and zeros at the others, harmless prompts are refused
    (Arditi et al. 2024, arXiv:2406.11717, section 3.2).
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    return {f"blocks.{i}.resid_pre": Partial(_add, vectors[i]) for i in range(vectors.shape[0])}


def _add(vector: Array, x: Array) -> Array:
    return (x.astype(jnp.float32) + vector[None, None]).astype(x.dtype)


def _without(direction: Array, weight: Array, x: Array) -> Array:
    along = jnp.einsum("blw,w->bl", x, direction, precision="highest")
    return x - weight * jnp.tensordot(along, direction, 0)


def _remove(direction: Array, weight: Array, x: Array) -> Array:
    return _without(direction, weight, x.astype(jnp.float32)).astype(x.dtype)


def _remove_before_norm(direction: Array, weight: Array, scale: Array, out: Array) -> Array:
    """What the norm of a sandwich block would have made of `y` without the direction.

    `out = scale * u` with `u = y / sqrt(mean(y^2) + eps)`. Taking the direction out of `y` takes it out of
    `u` and changes the root: `(mean(y'^2) + eps) / (mean(y^2) + eps) = mean(u'^2) + 1 - mean(u^2)`, exactly.
    A coordinate of scale 0 is unknown, but has no part in the direction, and cancels in that difference.
    """
    known = (scale != 0)[None, None]
    scale = scale[None, None]
    u = jnp.where(known, out.astype(jnp.float32) / jnp.where(known, scale, 1.0), 0.0)
    edited = _without(direction, weight, u)
    change = jnp.mean(jnp.square(edited), -1, keepdims=True) - jnp.mean(jnp.square(u), -1, keepdims=True)
    return (scale * edited * jax.lax.rsqrt(1.0 + change)).astype(out.dtype)
