"""What is removed from the residual stream, where, and how much of it: the parameters of an abliteration."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

__all__ = ["Ablation", "LayerKernel", "unit"]

_NOTHING = 1e-30


def unit(vectors: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """The vectors at length 1, float32; a vector that is zero stays zero, so that it never becomes NaN."""
    vectors = jnp.asarray(vectors, jnp.float32)
    norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return jnp.where(norms > _NOTHING, vectors / jnp.maximum(norms, _NOTHING), jnp.zeros_like(vectors))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKernel:
    """Weights over layers: a tent around one of them.

    `weight(l) = peak + (edge - peak) * |l - center| / reach` where `|l - center| <= reach`, else 0.

    Attributes:
        peak: the weight at the centre.
        center: in layers, not necessarily whole.
        edge: the weight at the distance `reach`.
        reach: in layers.
    """

    peak: Float[Array, ""] | float
    center: Float[Array, ""] | float
    edge: Float[Array, ""] | float
    reach: Float[Array, ""] | float

    def weights(self, layers: int) -> Float[Array, " layers"]:
        """The weight of each of `layers` layers, float32."""
        peak, center, edge, reach = (
            jnp.full((layers,), value, jnp.float32)
            for value in (self.peak, self.center, self.edge, self.reach)
        )
        distance = jnp.abs(jnp.arange(layers, dtype=jnp.float32) - center)
        inside = peak + (edge - peak) * distance / jnp.maximum(reach, 1e-6)
        return jnp.where(distance <= reach, inside, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablation:
    """Directions to take out of what is written to the residual stream, and the share of each to take.

    `y -> y - weight * (y . direction) * direction` for every `y` that a component writes. A pytree of arrays:
    programs that take one as an argument compile once, and several can be stacked and vmapped.

    Attributes:
        directions: float32 `[layers + 1, width]`, of length 1 (or 0: nothing is removed). Row 0 is taken out
            of the embeddings, row `i + 1` out of what block `i` writes.
        embeddings: the share for token and position embeddings; 1 removes the direction, 0 leaves it.
        attention: `[layers]`, for what attention writes.
        mlp: `[layers]`, for what feed-forward layers (of every expert) write.
    """

    directions: Float[Array, "rows width"]
    embeddings: Float[Array, ""]
    attention: Float[Array, " layers"]
    mlp: Float[Array, " layers"]

    @classmethod
    def everywhere(cls, direction: Float[Array, " width"], layers: int) -> Ablation:
        """One direction out of everything, as in Arditi et al. 2024 (arXiv:2406.11717)."""
        ones = jnp.ones(layers, jnp.float32)
        direction = unit(direction)
        rows = jnp.broadcast_to(direction[None], (layers + 1, direction.shape[0]))
        return cls(rows, jnp.float32(1.0), ones, ones)

    @property
    def layers(self) -> int:
        """How many blocks it is for."""
        return self.attention.shape[-1]
