"""Causal convolutions over the latest tokens, channel by channel, and the window that a cache keeps."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mergelab.models.derived import param

__all__ = ["ShortConvolution", "convolve"]


def convolve(
    x: Float[Array, "batch length channels"],
    window: Float[Array, "batch before channels"],
    kernel: Float[Array, "taps channels"],
    real: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch before channels"]]:
    """`y_t = sum_j kernel[taps - 1 - j] x_{t - j}` over real tokens, and the window after the last.

    Args:
        x: what is convolved.
        window: the `taps - 1` real tokens before the first; zeros where there are none.
        kernel: weights, that of a token itself last.
        real: False for padding, wherever it stands: outputs there are meaningless. None if there is none.
    """
    length, before = x.shape[1], window.shape[1]
    if real is not None:  # real tokens first, so that each follows the one before it
        order = jnp.argsort(~real, axis=1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
    joined = jnp.concatenate([window.astype(x.dtype), x], axis=1)
    kernel = kernel.astype(x.dtype)
    y = joined[:, before:] * kernel[before][None, None]
    for j in range(before):
        y = y + joined[:, j : j + length] * kernel[j][None, None]
    if real is None:
        return y, joined[:, length:]
    place = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    last = real.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(before, dtype=jnp.int32)[None]
    window = jnp.take_along_axis(joined, last[..., None], axis=1)
    return jnp.take_along_axis(y, place[..., None], axis=1), window


class ShortConvolution(nn.Module):
    """One convolution for each of several parts of a token, whose channels share one window.

    Parameters are `{part}` `[taps, channels]` and, if `bias`, `{part}_bias` `[channels]`.

    Attributes:
        taps: number of tokens that one output depends on.
        bias: whether there are biases.
        axis: logical name of the channels' axis, for sharding.
    """

    taps: int
    bias: bool = False
    axis: str = "heads"

    @nn.compact
    def __call__(
        self,
        parts: Mapping[str, Array],
        window: Float[Array, "batch before channels"],
        real: Bool[Array, "batch length"] | None,
    ) -> tuple[dict[str, Array], Float[Array, "batch before channels"]]:
        """Returns the convolved parts, of the shapes given, and the window after the last token."""
        initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        found: dict[str, Array] = {}
        windows, start = [], 0
        for name, x in parts.items():
            channels = x.shape[-1]
            kernel = param(self, name, initial, (self.taps, channels), (None, self.axis))
            y, after = convolve(x, window[..., start : start + channels], kernel, real)
            if self.bias:
                bias = param(self, f"{name}_bias", nn.initializers.zeros, (channels,), (self.axis,))
                y = y + bias.astype(y.dtype)[None, None]
            found[name] = y
            windows.append(after)
            start += channels
        return found, jnp.concatenate(windows, axis=-1)
