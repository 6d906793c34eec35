"""What an encoder leaves undone: its codes beside codes that were searched for, with the same atoms."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mergelab.errors import SAEError
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.layer_norm import layer_norm

__all__ = ["EncoderGap", "coding_target", "encoder_gap"]


@dataclass(frozen=True)
class EncoderGap:
    """Two codes of the same activations.

    Attributes:
        encoder_error: `sum |x - f A|^2 / sum |x - mean|^2` of the encoder's codes.
        searched_error: the same of the others.
        encoder_l0: latents that are not 0, on average.
        searched_l0: the same of the others.
        overlap: latents that both use over latents that either uses, over all tokens.
    """

    encoder_error: float
    searched_error: float
    encoder_l0: float
    searched_l0: float
    overlap: float


def coding_target(dictionary: Dictionary, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
    """What the decoder's rows must sum to: `x` less `b_dec`, after the dictionary's own normalisation.

    Raises:
        SAEError: the dictionary does not reconstruct what it reads.
    """
    if not dictionary.is_autoencoder or dictionary.W_skip is not None:
        raise SAEError("a transcoder's rows sum to another site; codes are searched for autoencoders only.")
    x = jnp.asarray(x, jnp.float32)
    normal = layer_norm(x)[0] if dictionary.config.normalization == "layer_norm" else x
    return normal - dictionary.b_dec[None]


def encoder_gap(
    dictionary: Dictionary, x: Float[Array, "tokens d"], codes: Float[Array, "tokens n"]
) -> EncoderGap:
    """Compares a dictionary's own codes of activations with others, of `coding_target` by `W_dec`.

    Raises:
        SAEError: shapes do not fit together, or as `coding_target`.
    """
    target = coding_target(dictionary, x)
    own = dictionary.encode(jnp.asarray(x, jnp.float32))
    if codes.shape != own.shape:
        raise SAEError(f"codes have shape {list(codes.shape)}; expected {list(own.shape)}.")
    spread = jnp.square(target - target.mean(axis=0, keepdims=True)).sum()

    def error(f: Array) -> float:
        return float(jnp.square(target - jnp.matmul(f, dictionary.W_dec, precision="highest")).sum() / spread)

    ours, theirs = own != 0, codes != 0
    either = (ours | theirs).sum(dtype=jnp.float32)
    return EncoderGap(
        error(own), error(codes),
        float(ours.sum(axis=1).mean()), float(theirs.sum(axis=1).mean()),
        float((ours & theirs).sum(dtype=jnp.float32) / jnp.maximum(either, 1.0)),
    )  # fmt: skip
