"""What is removed where, and the space in which a search varies it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mergelab.abliteration.directions import Directions
from mergelab.compat import register_dataclass
from mergelab.errors import MergelabError
from mergelab.interp.vectors import unit

__all__ = ["Ablation", "LayerKernel", "Space", "unit"]


@register_dataclass
@dataclass(frozen=True)
class LayerKernel:
    """Weights over layers: a tent around one of them.

    `weight(l) = peak + (edge - peak) * |l - center| / reach` where `|l - center| <= reach`, else 0.

    Attributes:
        peak: the weight at the center.
        center: layer of the largest weight, a real number of layers, not necessarily whole.
        edge: the weight at the distance `reach`.
        reach: distance from the center at which the weight ends, in layers.
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


@register_dataclass
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


_KERNEL = ("peak", "center", "edge", "reach")


@dataclass(frozen=True, eq=False)
class Space:
    """A box of parameters, each of which makes an `Ablation`.

    - `source`: the layer whose direction is removed; between two layers, of the sum of their directions in
      proportion.
    - `own`: above 0.5 every block loses the direction found before it, in place of that one.
    - `embeddings`: the share for embeddings.
    - `attention.peak`, `.center`, `.edge`, `.reach`, and the same of `mlp`: a `LayerKernel` for each, its
      `edge` as a part of the peak.

    Attributes:
        directions: float32 `[layers, width]`, of length 1, or 0 where there is none.
        low: the least value of each parameter.
        high: the largest.
    """

    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, directions: Directions, position: int = -1, *, max_share: float = 1.5) -> Space:
        """The space of the directions found at one position.

        Args:
            directions: candidate directions of all layers.
            position: place counted from the prompt's end, -1 being its last token.
            max_share: the largest share that is removed; above 1 a part of the direction is turned round.

        Raises:
            MergelabError: there is no direction at that position.
        """
        found = directions.unit[position]
        layers = len(found)
        if not found.any():
            raise MergelabError(f"there is no direction at position {position}; look at another one.")
        first = int(np.flatnonzero(found.any(axis=1))[0])
        kernel_low, kernel_high = [0, 0, 0, 1], [max_share, layers - 1, 1, layers]
        low = np.array([first, 0, 0, *kernel_low, *kernel_low], np.float64)
        high = np.array([layers - 1, 1, 1, *kernel_high, *kernel_high], np.float64)
        return cls(found, low, high)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in order."""
        kernels = (f"{part}.{name}" for part in ("attention", "mlp") for name in _KERNEL)
        return ("source", "own", "embeddings", *kernels)

    def plain(self, source: float | None = None) -> np.ndarray:
        """One direction out of everything: by default that of the layer at two thirds of the depth."""
        layers = len(self.directions)
        kernel = [1.0, (layers - 1) / 2, 1.0, float(layers)]
        layer = round(2 / 3 * (layers - 1)) if source is None else source
        return self.clip(np.array([layer, 0.0, 1.0, *kernel, *kernel]))

    def nothing(self) -> np.ndarray:
        """Removes nothing."""
        point = self.plain()
        point[[self.names.index(name) for name in ("embeddings", "attention.peak", "mlp.peak")]] = 0
        return point

    def clip(self, points: np.ndarray) -> np.ndarray:
        """The nearest points of the box."""
        return np.clip(points, self.low, self.high)

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Points spread evenly at random, float64 `[count, parameters]`; the same for the same seed."""
        shares = np.random.default_rng(seed).random((count, len(self.low)))
        return self.low + shares * (self.high - self.low)

    def ablation(self, points: Float[Array, "*points parameters"]) -> Ablation:
        """What a point removes; of several points, a stack of ablations."""
        directions, names = jnp.asarray(self.directions), self.names
        return _stack(directions, points, names) if points.ndim > 1 else _one(directions, points, names)


def _ablation(
    own: Float[Array, "layers width"], point: Float[Array, " parameters"], names: tuple[str, ...]
) -> Ablation:
    value = dict(zip(names, point, strict=True))
    layers = len(own)
    below = jnp.clip(jnp.floor(value["source"]).astype(jnp.int32), 0, layers - 1)
    above = jnp.minimum(below + 1, layers - 1)
    share = value["source"] - below.astype(jnp.float32)
    shared = unit((1 - share) * own[below] + share * own[above])
    blocks = jnp.where(value["own"] > 0.5, own, jnp.broadcast_to(shared[None], own.shape))
    attention, mlp = (
        LayerKernel(
            value[f"{part}.peak"],
            value[f"{part}.center"],
            value[f"{part}.peak"] * value[f"{part}.edge"],
            value[f"{part}.reach"],
        ).weights(layers)
        for part in ("attention", "mlp")
    )
    return Ablation(jnp.concatenate([shared[None], blocks]), value["embeddings"], attention, mlp)


_one = jax.jit(_ablation, static_argnums=2)
_stack = jax.jit(jax.vmap(_ablation, in_axes=(None, 0, None)), static_argnums=2)
