"""Value vectors: the rows of MLP output matrices, and the tokens they point to.

Geva et al. 2022 (arXiv:2203.14680): a neuron adds its row, scaled by its activation, to the stream, and so
promotes the tokens whose embeddings the row resembles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import SiteError
from mergelab.interp.vectors import unit
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import unembedding

__all__ = ["ValueVectors", "tokens_of_values", "value_search"]

Embedding = Literal["output", "input"]


@dataclass(frozen=True)
class ValueVectors:
    """The value vectors nearest to some directions, the nearest first: `[directions, k]` each.

    Attributes:
        layers: the block.
        neurons: the neuron in its MLP; with experts, `expert * neurons of one + neuron`.
        cosines: cosine of each with the direction, float32.
    """

    layers: np.ndarray
    neurons: np.ndarray
    cosines: np.ndarray


def value_search(
    model: Model, params: Params, directions: Any, *, k: int = 10, embedding: Embedding = "output"
) -> ValueVectors:
    """Searches the value vectors of all layers.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        directions: token ids `[tokens]`, or vectors `[directions, width]`.
        k: how many to find for each.
        embedding: kind of embedding meant by a token; ignored with vectors.

    Raises:
        SiteError: the model is an encoder, the vectors have another width, or k is not within 1 and the
            number of neurons.
    """
    wanted = jnp.asarray(directions)
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        wanted = _embeddings(model, params, embedding)[wanted]
    rows = _values(model, params, 0).shape[0]
    if (
        wanted.ndim != 2
        or wanted.shape[1] != model.config.d_model
        or not 1 <= k <= rows * model.config.n_layers
    ):
        raise SiteError(
            f"directions of shape {list(wanted.shape)} cannot be searched for {k} of "
            f"{rows * model.config.n_layers} value vectors; expected [directions, {model.config.d_model}]."
        )
    cosines, places = _search(model, params, unit(wanted), k)
    layers, neurons = np.divmod(np.asarray(places), rows)
    return ValueVectors(layers, neurons, np.asarray(cosines))


def tokens_of_values(
    model: Model, params: Params, layer: int, neurons: Any, *, k: int = 10, embedding: Embedding = "output"
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that value vectors point to.

    Args:
        model: a decoder.
        params: its parameters.
        layer: the block.
        neurons: `[neurons]`, counted as in `ValueVectors`.
        k: tokens for each.
        embedding: kind of embedding meant.

    Returns:
        Token ids `[neurons, k]`, the nearest first, and their cosines.

    Raises:
        SiteError: the model is an encoder, or there is no such layer or neuron.
    """
    if not 0 <= layer < model.config.n_layers:
        raise SiteError(
            f"block {layer} does not exist: the model has {model.config.n_layers}, counted from 0."
        )
    rows, chosen = _values(model, params, layer), np.asarray(neurons, np.int32)
    if chosen.ndim != 1 or ((chosen < 0) | (chosen >= rows.shape[0])).any():
        raise SiteError(f"neurons {chosen.tolist()} are not all within the {rows.shape[0]} of block {layer}.")
    tokens = unit(_embeddings(model, params, embedding))
    cosines, found = jax.lax.top_k(jnp.matmul(unit(rows[chosen]), tokens.T, precision="highest"), k)
    return np.asarray(found), np.asarray(cosines)


def _embeddings(model: Model, params: Params, embedding: Embedding) -> Array:
    """`[vocab, width]`."""
    output = unembedding(model, params)
    return output.T if embedding == "output" else params["embed"]["embedding"]


def _values(model: Model, params: Params, layer: int) -> Array:
    """The rows that the neurons of a block write: `[neurons, width]`."""
    unembedding(model, params)  # refuses encoders
    down = params[f"blocks_{layer}"]["mlp"]["down"]
    kernel = down["kernel"] if isinstance(down, Mapping) else down  # experts are one stack
    return kernel.reshape(-1, kernel.shape[-1])


@partial(jax.jit, static_argnames=("model", "k"))
def _search(model: Model, params: Params, directions: Array, k: int) -> tuple[Array, Array]:
    """Layer by layer, keeping the best: memory is that of the cosines of one layer."""
    best = jnp.full((directions.shape[0], k), -jnp.inf)
    places = jnp.zeros((directions.shape[0], k), jnp.int32)
    for layer in range(model.config.n_layers):
        rows = unit(_values(model, params, layer))
        cosines = jnp.matmul(directions, rows.T, precision="highest")
        count = rows.shape[0]
        here = layer * count + jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], cosines.shape)
        best, order = jax.lax.top_k(jnp.concatenate([best, cosines], axis=1), k)
        places = jnp.take_along_axis(jnp.concatenate([places, here], axis=1), order, axis=1)
    return best, places
