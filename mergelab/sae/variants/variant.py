"""What a variant is: hyper-parameters, parameters, codes and a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.compat import register_dataclass
from mergelab.errors import SAEError, quoted
from mergelab.sae.activation_functions import ActivationFunction
from mergelab.sae.kernels.codes import Codes
from mergelab.sae.kernels.collectives import ONE_DEVICE, Shards
from mergelab.sae.kernels.rows import row_dot

__all__ = ["Context", "Encoded", "Outcome", "SAEParams", "Variant", "alive_bias"]


def alive_bias(params: SAEParams, context: Context) -> Array:
    """The encoder's bias `[n]`, so low for latents that take no part that they never fire."""
    bias = params["encoder_bias"]
    return bias if context.alive is None else jnp.where(context.alive, bias, jnp.finfo(bias.dtype).min)


SAEParams = dict[str, Array]
"""`encoder [n, d_in]`, `encoder_bias [n]`, `decoder [n, d_out]`, `decoder_bias [d_out]`, a variant's own."""


_MOST = 2**31 - 1


def _weights(n_latents: int, d_in: int, d_out: int) -> str:
    size = 4 * n_latents * (d_in + d_out) // 10**12
    return f"{size:,} TB" if size < 10**12 else "more memory than there is"


@dataclass(frozen=True)
class Context:
    """What a loss needs to know besides parameters and a batch.

    Attributes:
        tokens: tokens in the batch, over all devices.
        mse_scale: the constant that divides the mean squared error by the variance of the targets.
        progress: how much of the training is done, 0 to 1; penalties warm up with it.
        statistics: running numbers of the variant, such as a threshold.
        shards: the mesh axes.
        compute_dtype: dtype of the factors of the encoder's product.
        k: overrides the variant's k (a sweep over k); at most the variant's.
        alive: `[n]`, bool: the latents that take part (a sweep over the number of latents); None for all.
    """

    tokens: int
    mse_scale: Array
    progress: Array
    statistics: Mapping[str, Array] = field(default_factory=dict)
    shards: Shards = ONE_DEVICE
    compute_dtype: str = "float32"
    k: Array | None = None
    alive: Array | None = None

    def mean(self, per_token: Array) -> Array:
        """This device's share of a mean over the tokens of the batch: `[tokens]` -> scalar."""
        return per_token.sum() / self.tokens

    def nmse(self, error: Array) -> Array:
        """This device's share of the mean squared error, normalized: `[tokens, d_out]` -> scalar."""
        return self.mean(row_dot(error, error)) * (self.mse_scale / error.shape[1])


@dataclass(frozen=True)
class Encoded:
    """Codes of a batch, and what else their computation gave.

    Attributes:
        codes: codes that are decoded.
        penalty: added to the loss; each device's share.
        also: further codes whose reconstruction error counts, with their weight.
        statistics: the running numbers after this batch.
    """

    codes: Codes
    penalty: Array | float = 0.0
    also: tuple[tuple[Array | float, Codes], ...] = ()
    statistics: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a loss tells besides its value.

    Attributes:
        codes: codes of the batch.
        error: `[tokens, d_out]`, target minus reconstruction.
        nmse: this device's share of the normalized mean squared error.
        statistics: the running numbers after this batch.
    """

    codes: Codes
    error: Array
    nmse: Array
    statistics: Mapping[str, Array]


register_dataclass(Outcome, ["codes", "error", "nmse", "statistics"], [])


@dataclass(frozen=True)
class Variant:
    """Base of all variants.

    Attributes:
        d_in: width of the activations that are read.
        n_latents: number of latents.
        d_out: width of the targets, for a transcoder; None reconstructs the input, which is then centered by
            the decoder's bias before it is encoded.
        skip: adds a linear map from input to output, for a skip transcoder.
        sites: number of activations of equal width that make the input, side by side, for a crosscoder.
    """

    d_in: int
    n_latents: int
    d_out: int | None = None
    skip: bool = False
    sites: int = 1

    name: ClassVar[str]
    activation: ClassVar[type[ActivationFunction]]
    """From pre-activations to codes, in training and in the finished SAE."""
    unit_decoder: ClassVar[bool] = True
    """Whether rows of the decoder are kept at norm 1; otherwise the penalty weighs codes by that norm."""
    uses_aux_k: ClassVar[bool] = True
    """Whether dead latents are trained on what the others leave unexplained (AuxK)."""

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "sites"):
            if getattr(self, name) < 1:
                raise SAEError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, value in vars(self).items():
            if isinstance(value, int) and value > _MOST:
                raise SAEError(
                    f"{name} is {quoted(value)}; what it counts is numbered in 32 bits, so it is at most "
                    f"{_MOST} (the weights alone would take "
                    f"{_weights(self.n_latents, self.d_in, self.width_out)})."
                )
        if self.d_in % self.sites or self.width_out % self.sites:
            raise SAEError(
                f"a crosscoder of {self.sites} sites reads widths it can divide, not d_in={self.d_in}; "
                "d_in counts all sites side by side."
            )
        if self.skip and self.d_out is None:
            raise SAEError("skip is for transcoders: give d_out, or omit skip.")

    @property
    def width_out(self) -> int:
        """Width of what is reconstructed."""
        return self.d_in if self.d_out is None else self.d_out

    def own_params(self) -> SAEParams:
        """Parameters besides the four that all variants have, at their initial values."""
        return {}

    def own_statistics(self) -> dict[str, Array]:
        """Running numbers at the start of a training."""
        return {}

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        """The codes of a batch: `x [tokens, d_in]`, centered."""
        raise NotImplementedError

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        """What a finished SAE says of its activation: its name, `k`, arrays such as `threshold`."""
        raise NotImplementedError

    def center(self, params: SAEParams, x: Array, shards: Shards) -> Array:
        """`x` as the encoder reads it."""
        if self.d_out is not None:
            return x
        return x - shards.share_with_latents(params["decoder_bias"])[None, :]

    def reconstruct(self, params: SAEParams, codes: Codes, x: Array, context: Context) -> Array:
        """`[tokens, d_out]` from the codes of all shards."""
        out = context.shards.join_latents(codes.decode(params["decoder"])) + params["decoder_bias"][None, :]
        return out + x @ params["skip"] if self.skip else out

    def loss(self, params: SAEParams, x: Array, y: Array, context: Context) -> tuple[Array, Outcome]:
        """This device's share of the loss, in units of normalized mean squared error.

        Args:
            params: this device's shard of the latents.
            x: `[tokens, d_in]`, this device's tokens.
            y: `[tokens, d_out]`, what to reconstruct.
            context: everything else.
        """
        encoded = self.encode(params, self.center(params, x, context.shards), context)
        error = y - self.reconstruct(params, encoded.codes, x, context)
        nmse = context.nmse(error)
        loss = nmse + encoded.penalty
        for weight, codes in encoded.also:
            loss = loss + weight * context.nmse(y - self.reconstruct(params, codes, x, context))
        return loss, Outcome(encoded.codes, error, nmse, encoded.statistics)

    def decoder_norms(self, decoder: Array) -> Array:
        """`[n]`: norms of the decoder's rows; for a crosscoder the sum over sites of their norms."""
        n, width = decoder.shape
        parts = decoder.reshape(n * self.sites, width // self.sites)
        return jnp.sqrt(row_dot(parts, parts) + 1e-12).reshape(n, self.sites).sum(axis=1)
