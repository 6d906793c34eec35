"""The parameters a search may vary: which layer's direction, and how its removal is spread over layers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mergelab.errors import MergelabError
from mergelab.interp.abliteration.ablation import Ablation, LayerKernel, unit
from mergelab.interp.abliteration.directions import Directions

__all__ = ["Space"]

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
            directions: of all layers.
            position: from the prompt's end, -1 being its last token.
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
