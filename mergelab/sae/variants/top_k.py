"""TopK SAEs, with several k at once, and the transcoders and crosscoders made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae import activation_functions
from mergelab.sae.kernels.codes import top_k_codes
from mergelab.sae.kernels.rows import row_dot
from mergelab.sae.variants.variant import Context, Encoded, SAEParams, Variant, alive_bias

__all__ = ["MultiTopK", "TopK", "crosscoder", "site_norms", "transcoder"]


@dataclass(frozen=True)
class TopK(Variant):
    """`z = relu(top_k(encoder (x - b_pre) + encoder_bias))`.

    Attributes:
        k: latents per token.
        half_weight: weight of the error of a second reconstruction, from the largest half of the k codes; 0
            leaves it out.
        half_from: finished fraction of the training from which on that error counts.
    """

    k: int = 32
    half_weight: float = 0.0
    half_from: float = 0.5

    name: ClassVar[str] = "topk"
    activation = activation_functions.TopKFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_latents:
            raise SAEError(f"k is {self.k}; it must be from 1 to n_latents={self.n_latents}.")
        if self.half_weight < 0:
            raise SAEError(f"half_weight is {self.half_weight}; it must be at least 0.")
        if not 0 <= self.half_from <= 1:
            raise SAEError(f"half_from is {self.half_from}; it must be from 0 to 1.")

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        k = self.k if context.k is None else context.k
        weights, ks, most = [], [k], self.k
        if self.half_weight:
            # Not by a branch: what the codes of k cost is paid in any case, and these are among them.
            weights.append(jnp.where(context.progress >= self.half_from, self.half_weight, 0.0))
            ks.append(jnp.maximum(jnp.asarray(k) // 2, 1))
        for weight, multiple in self.wider():
            weights.append(weight)
            ks.append(multiple * k)
            most = max(most, min(multiple * self.k, self.n_latents))
        codes, *others = top_k_codes(
            x,
            *self.encoder(params, context),
            ks,
            most,
            context.shards,
            ranking=self.activation,
            compute_dtype=context.compute_dtype,
        )
        return Encoded(codes, also=tuple(zip(weights, others, strict=True)))

    def wider(self) -> tuple[tuple[float, int], ...]:
        """Reconstructions from more codes that count too: weights of their errors, and multiples of k."""
        return ()

    def encoder(self, params: SAEParams, context: Context) -> tuple[Array, Array]:
        """Weights and bias with which latents that take no part are never kept."""
        return params["encoder"], alive_bias(params, context)

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {"activation": self.activation.name, "k": self.k}


@dataclass(frozen=True)
class MultiTopK(TopK):
    """TopK with the loss `L(k) + weight * L(multiple * k)`.

    Attributes:
        multiple: multiple of k that the second reconstruction uses.
        weight: weight of its error.
    """

    multiple: int = 4
    weight: float = 1 / 8

    name: ClassVar[str] = "multi_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple < 1 or self.multiple * self.k >= 2**31:
            raise SAEError(
                f"multiple is {self.multiple}; it must be at least 1, and times k below 2147483648."
            )

    def wider(self) -> tuple[tuple[float, int], ...]:
        return ((self.weight, self.multiple),)


def transcoder(
    d_in: int, d_out: int, n_latents: int, *, kind: type[Variant] = TopK, skip: bool = False, **options: Any
) -> Variant:
    """A transcoder: any kind of sparse code, with a target of its own.

    Args:
        d_in: width of the activation that is read.
        d_out: width of the one that is reconstructed.
        n_latents: number of latents.
        kind: the kind of code.
        skip: adds `x @ skip`, a `[d_in, d_out]` matrix that starts at zero.
        **options: hyper-parameters of the kind, such as `k`.
    """
    return kind(d_in=d_in, n_latents=n_latents, d_out=d_out, skip=skip, **options)


def crosscoder(
    d_model: int, sites: int, n_latents: int, *, kind: type[Variant] = TopK, **options: Any
) -> Variant:
    """A crosscoder over `sites` activations of width `d_model`: any kind of sparse code.

    A kind with a penalty weighs each code by the sum over sites of its decoder's norms, so that a latent may
    live at one site or at many at the same price.

    Args:
        d_model: width of each activation.
        sites: number of activations.
        n_latents: number of latents.
        kind: the kind of code.
        **options: hyper-parameters of the kind, such as `k`.
    """
    return kind(d_in=sites * d_model, n_latents=n_latents, sites=sites, **options)


def site_norms(decoder: Array, sites: int) -> Array:
    """Decoder norms by site: `[n, sites * d_model]` -> `[n, sites]`; where each latent lives."""
    n, width = decoder.shape
    parts = decoder.reshape(n * sites, width // sites)
    return jnp.sqrt(row_dot(parts, parts)).reshape(n, sites)
