"""Matryoshka: every prefix of the SAE reconstructs on its own, so the first latents stay general.

Bussmann et al., arXiv 2503.17547. On TopK or BatchTopK codes: the choice of latents is that of the whole
SAE, and each prefix decodes its part of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae import activation_functions
from mergelab.sae.variants.batch_top_k import BatchTopK
from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Context, Encoded, Outcome, SAEParams, Variant

__all__ = ["Matryoshka"]


@dataclass(frozen=True)
class Matryoshka(Variant):
    """The mean of the reconstruction errors of nested prefixes.

    Attributes:
        k: latents per token.
        prefixes: number of latents of each prefix, rising; the last is all. By default each is twice the one
            before, five of them.
        select: `batch_topk` or `topk`.
    """

    k: int = 32
    prefixes: tuple[int, ...] = field(default=())
    select: str = "batch_topk"

    name: ClassVar[str] = "matryoshka"
    activation = activation_functions.BatchTopKFunction

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in ("topk", "batch_topk"):
            raise SAEError(f"select is {self.select!r}; a matryoshka selects by 'topk' or 'batch_topk'.")
        sizes = tuple(self.prefixes) or tuple(max(self.n_latents >> i, 1) for i in range(4, -1, -1))
        if any(a >= b for a, b in pairwise((0, *sizes))) or sizes[-1] != self.n_latents:
            raise SAEError(
                f"prefixes are {list(sizes)}; they must rise from above 0 to n_latents={self.n_latents}."
            )
        object.__setattr__(self, "prefixes", sizes)
        _ = self._selector  # its k is checked where it is made

    @property
    def _selector(self) -> TopK | BatchTopK:
        kind = TopK if self.select == "topk" else BatchTopK
        return kind(self.d_in, self.n_latents, self.d_out, self.skip, self.sites, k=self.k)

    def own_statistics(self) -> dict[str, Array]:
        return self._selector.own_statistics()

    def encode(self, params: SAEParams, x: Array, context: Context) -> Encoded:
        return self._selector.encode(params, x, context)

    def loss(self, params: SAEParams, x: Array, y: Array, context: Context) -> tuple[Array, Outcome]:
        encoded = self.encode(params, self.center(params, x, context.shards), context)
        n_local = params["encoder"].shape[0]
        latent = jnp.arange(n_local) + context.shards.latent_offset(n_local)
        total, error = jnp.zeros(()), y - self._constant(params, x)
        nmse = context.nmse(error)
        for start, end in pairwise((0, *self.prefixes)):
            ring = encoded.codes.only((latent >= start) & (latent < end))
            error = error - context.shards.join_latents(ring.decode(params["decoder"]))
            nmse = context.nmse(error)
            total = total + nmse / len(self.prefixes)
        outcome = Outcome(encoded.codes, error, nmse, encoded.statistics)
        return total + encoded.penalty, outcome

    def _constant(self, params: SAEParams, x: Array) -> Array:
        bias = params["decoder_bias"][None, :]
        return bias + x @ params["skip"] if self.skip else bias

    def export(self, params: SAEParams, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return replace(self._selector).export(params, statistics)
