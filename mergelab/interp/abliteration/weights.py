"""Takes directions out of a model's weights: every parameter that writes to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from mergelab.errors import MergelabError
from mergelab.interp.abliteration.ablation import Ablation, unit
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import Writer, writers
from mergelab.models.table import get_leaf, tree_from_leaves

__all__ = ["KeepNorms", "abliterate_params", "check_ablation", "orthogonalise", "writer_terms"]

KeepNorms = Literal["written", "coordinate"] | None
"""Which norms an edited matrix `[in, width]` keeps exactly.

`written` keeps that of each vector `[width]` that one input writes (a token's embedding, a neuron's output):
scaling a vector does not turn it, so that the direction stays removed. `coordinate` keeps that of each
residual coordinate, `[in]`: the rows of a stored `Linear`. Scaling coordinates turns the vectors, and some of
the direction comes back.
"""


def orthogonalise(
    matrix: Float[Array, "*batch width"],
    direction: Float[Array, " width"],
    weight: Float[Array, ""] | float = 1.0,
    *,
    keep_norms: KeepNorms = None,
) -> Float[Array, "*batch width"]:
    """`W - weight * (W r) r^T`: what is left of each vector `[width]` without the direction.

    Args:
        matrix: kernels `[..., in, width]`, tables `[rows, width]` or a bias `[width]`; any float dtype.
        direction: `r`, of length 1 (or 0).
        weight: the share of the direction to remove.
        keep_norms: norms to keep; a bias keeps none.

    Returns:
        The same shape and dtype, computed in float32.

    Reference: Arditi et al. 2024, arXiv:2406.11717, section 4.1.
    """
    before = matrix.astype(jnp.float32)
    along = jnp.einsum("...w,w->...", before, direction, precision="highest")
    after = before - weight * jnp.tensordot(along, direction, 0)
    if keep_norms is not None and before.ndim > 1:
        axis = -1 if keep_norms == "written" else -2
        old, new = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (before, after))
        # What lay wholly in the direction is gone, and has no norm to keep.
        after = after * jnp.where(new > 1e-6 * old, old / jnp.where(new > 0, new, 1.0), 1.0)
    return after.astype(matrix.dtype)


def writer_terms(
    model: Model, writer: Writer, ablation: Ablation, gain: Array | np.ndarray | None
) -> tuple[Float[Array, " width"], Float[Array, ""]]:
    """The direction and the weight for one parameter.

    A gain `g` stands between the parameter and the stream in sandwich blocks: what is written is
    `g * y / rms(y)`, which has no part along `r` exactly if `y` has none along `g * r`.

    Args:
        model: the model.
        writer: the parameter.
        ablation: what is removed.
        gain: the stored scale that `writer.gain` names, or None.
    """
    row = 0 if writer.layer is None else writer.layer + 1
    direction = ablation.directions[jnp.int32(row)]  # one gather for all rows, where a number compiles anew
    if gain is not None:
        direction = unit(direction * (jnp.asarray(gain, jnp.float32) + model.config.norm.offset))
    if writer.layer is None:
        return direction, ablation.embeddings
    weights = ablation.attention if writer.component == "attention" else ablation.mlp
    return direction, weights[jnp.int32(writer.layer)]


def check_ablation(model: Model, ablation: Ablation) -> None:
    """Checks that an ablation fits a model.

    Raises:
        MergelabError: it is for another number of layers or another width.
    """
    layers, width = model.config.layers, model.config.width
    if ablation.directions.shape[-2:] != (layers + 1, width) or ablation.layers != layers:
        raise MergelabError(
            f"the directions have shape {list(ablation.directions.shape)} and the weights are for "
            f"{ablation.layers} layers, but the model has {layers} layers of width {width}; expected "
            f"[{layers + 1}, {width}]."
        )


def abliterate_params(
    model: Model, params: Mapping[str, Any], ablation: Ablation, *, keep_norms: KeepNorms = None
) -> Params:
    """The parameters of a model that cannot write the directions: pure, jittable, on any mesh.

    A tied output embedding is the input embedding, and is edited with it.

    Args:
        model: a decoder.
        params: its parameters.
        ablation: what is removed, and where.
        keep_norms: norms that the matrices keep.

    Returns:
        Parameters of the same dtypes and shardings; leaves that write nothing are the same arrays.

    Raises:
        MergelabError: the model is an encoder, or the ablation does not fit it.
    """
    check_ablation(model, ablation)
    arrays = {leaf: get_leaf(params, leaf) for leaf in model.table()}
    for writer in writers(model):
        gain = None if writer.gain is None else arrays[writer.gain]
        direction, weight = writer_terms(model, writer, ablation, gain)
        edited = _orthogonalise(arrays[writer.leaf], direction, weight, keep_norms=keep_norms)
        arrays[writer.leaf] = edited
    return tree_from_leaves(arrays)


_orthogonalise = jax.jit(orthogonalise, static_argnames="keep_norms")
