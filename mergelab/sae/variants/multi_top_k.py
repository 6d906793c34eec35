"""Multi-TopK: also reconstructs from 4k latents, so codes serve more than one k (arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.sparse.encode import prefers_dense, top_k_codes
from mergelab.sae.variants.live import live_bias
from mergelab.sae.variants.top_k import TopK
from mergelab.sae.variants.variant import Context, Encoded, Params

__all__ = ["MultiTopK"]


@dataclass(frozen=True)
class MultiTopK(TopK):
    """TopK with the loss `L(k) + weight * L(multiple * k)`.

    Attributes:
        multiple: how many times k the second reconstruction uses.
        weight: of its error.
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

    def encode(self, params: Params, x: Array, context: Context) -> Encoded:
        k = self.k if context.k is None else context.k
        most = min(self.multiple * self.k, self.n_latents)
        codes, wide = top_k_codes(
            x,
            params["encoder"],
            live_bias(params, context),
            [k, self.multiple * k],
            most,
            context.shards,
            dense=prefers_dense(self.n_latents, most, context.shards.platform),
            compute_dtype=context.compute_dtype,
        )
        return Encoded(codes, also=((self.weight, wide),))
