"""RMS and layer normalization, computed in float32, with their data-dependent factor as a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mergelab.models.derived import param
from mergelab.models.sites import Tap

__all__ = ["Norm", "NormKind"]


@dataclass(frozen=True)
class NormKind:
    """Which norm a model uses.

    Attributes:
        kind: `rms`, `layer`, or `none`: no norm, whose factor is 1 (the end of OPT 350m).
        eps: added to the mean square.
        offset: what is added to the stored scale (Gemma stores `scale - 1`).
        scaled: whether there is a scale (OLMo 1 has none).
        biased: whether a layer norm has a bias (those of OLMo 1 and Cohere have none).
    """

    kind: Literal["rms", "layer", "none"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    scaled: bool = True
    biased: bool = True

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias: RMS norms have none."""
        return self.kind == "layer" and self.biased


class Norm(nn.Module):
    """`(x - mean) * factor * (offset + scale) + bias` over the last axis; RMS norms have no mean and no bias.

    The factor is `1 / sqrt(mean(x^2) + eps)` (Zhang & Sennrich, arXiv:1910.07467), or that of the centered
    `x` (Ba et al., arXiv:1607.06450). With a site's name it passes the tap as `{site}.scale`, `[..., 1]`.

    Attributes:
        config: which norm.
        axis: logical name of the axis normalized over, for sharding.
        heads: logical name of the axis before it, where each of its entries has a scale of its own (Cohere).
    """

    config: NormKind
    axis: str | None = "embed"
    heads: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch width"], tap: Tap | None = None, site: str = ""
    ) -> Float[Array, "*batch width"]:
        shape, axes = (x.shape[-1],), (self.axis,)
        if self.heads is not None:
            shape, axes = (x.shape[-2], x.shape[-1]), (self.heads, None)
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        if self.config.kind == "none":
            factor = jnp.ones((*y.shape[:-1], 1), jnp.float32)
        else:
            factor = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.eps)
        if tap is not None:
            factor = tap(f"{site}.scale", factor)
        y = y * factor
        if self.config.scaled:
            initial = nn.initializers.constant(1.0 - self.config.offset)
            scale = param(self, "scale", initial, shape, axes).astype(jnp.float32) + self.config.offset
            y = y * jnp.broadcast_to(scale, y.shape)
        if self.config.has_bias:
            bias = param(self, "bias", nn.initializers.zeros, shape, axes).astype(jnp.float32)
            y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(x.dtype)
