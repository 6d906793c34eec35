"""From a residual stream to logits, outside of a forward pass: the last norm and the output embedding."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mergelab.errors import SiteError
from mergelab.models.layers.attention import soft_cap
from mergelab.models.layers.norms import Norm
from mergelab.models.model import Model, Params

__all__ = ["norm_gain", "readout", "require_decoder", "unembedding"]


def require_decoder(model: Model) -> None:
    """Checks that a model has a residual stream that is read into logits.

    Raises:
        SiteError: it is an encoder: its norms stand on the stream itself, and nothing reads tokens off it.
    """
    if not model.family.architecture.causal:
        raise SiteError(
            f"a {model.family.model_type!r} model is an encoder: norms stand on its stream, and nothing "
            "reads tokens off it; take a decoder."
        )


def unembedding(model: Model, params: Params) -> Float[Array, "width vocab"]:
    """The output embedding, in its stored dtype; the transposed input embedding where they are tied.

    Raises:
        SiteError: the model is an encoder.
    """
    require_decoder(model)
    return params["embed"]["embedding"].T if model.config.tied else params["unembed"]["kernel"]


def norm_gain(model: Model, params: Params, *path: str) -> Float[Array, " width"]:
    """What a norm multiplies each coordinate with, float32: its stored scale, and the family's offset."""
    node = params
    for name in path:
        node = node[name]
    return node["scale"].astype(jnp.float32) + model.config.norm.offset


def readout(model: Model, params: Params, stream: Float[Array, "*rows width"]) -> Float[Array, "*rows vocab"]:
    """Logits, float32, of a stream before the last norm, soft cap included.

    Of the site `blocks.{last}.resid_post` they are the model's own.

    Raises:
        SiteError: the model is an encoder.
    """
    kernel = unembedding(model, params)
    normed: Array = Norm(model.config.norm).apply({"params": params["final_norm"]}, stream)  # pyright: ignore[reportAssignmentType]
    logits = jnp.matmul(normed, kernel.astype(normed.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits.astype(jnp.float32), model.config.logit_cap)
