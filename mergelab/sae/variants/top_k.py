"""TopK: each token keeps its k largest pre-activations (Gao et al., arXiv 2406.04093): the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.sparse.encode import prefers_dense, top_k_codes
from mergelab.sae.variants.live import live_bias
from mergelab.sae.variants.variant import Context, Encoded, Params, Variant

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Variant):
    """`z = relu(top_k(encoder (x - b_pre) + encoder_bias))`.

    Attributes:
        k: latents per token.
    """

    k: int = 32

    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_latents:
            raise SAEError(f"k is {self.k}; it must be from 1 to n_latents={self.n_latents}.")

    def encode(self, params: Params, x: Array, context: Context) -> Encoded:
        (codes,) = top_k_codes(
            x,
            params["encoder"],
            live_bias(params, context),
            [self.k if context.k is None else context.k],
            self.k,
            context.shards,
            dense=prefers_dense(self.n_latents, self.k, context.shards.platform),
            compute_dtype=context.compute_dtype,
        )
        return Encoded(codes)

    def export(self, params: Params, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {"activation": "topk", "k": self.k}
