"""A mixture of gated feed-forward experts: every token goes to the few that its router prefers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mergelab.models.layers.activations import ACTIVATIONS
from mergelab.models.layers.linear import matmul
from mergelab.models.sites import Tap

__all__ = ["MixtureOfExperts", "route"]


def route(logits: Float[Array, "batch length experts"], chosen: int) -> Float[Array, "batch length experts"]:
    """Softmax over the `chosen` largest logits of each token, zero elsewhere (Mixtral, arXiv:2401.04088).

    Args:
        logits: the router's, float32.
        chosen: experts per token.
    """
    values, indices = jax.lax.top_k(logits, chosen)
    one_hot = jax.nn.one_hot(indices, logits.shape[-1], dtype=logits.dtype)
    return jnp.einsum("blc,blce->ble", jax.nn.softmax(values, axis=-1), one_hot)


class MixtureOfExperts(nn.Module):
    """Gated experts with stacked kernels `[experts, in, out]`, combined by the router's weights.

    Every expert sees every token and unchosen ones get weight zero: exact, differentiable, and it shards over
    the experts' axis with one sum; it costs `experts / chosen` times the arithmetic of a sparse dispatch.

    Sites, under the name it is called with: `router` (the weights, `[batch, length, experts]`), `pre` and
    `post` (`[batch, length, experts, hidden]`), `out`.

    Attributes:
        experts: how many there are.
        chosen: how many each token uses.
        hidden: number of neurons of one expert.
        activation: a name of `ACTIVATIONS`.
        initial_gain: of the output projections.
    """

    experts: int
    chosen: int
    hidden: int
    activation: str
    initial_gain: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], tap: Tap, site: str
    ) -> Float[Array, "batch length width"]:
        width = x.shape[-1]
        stacked = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        output = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal", batch_axis=0)
        router = self.param("router", nn.initializers.lecun_normal(), (width, self.experts))
        gate = self.param("gate", stacked, (self.experts, width, self.hidden))
        up = self.param("up", stacked, (self.experts, width, self.hidden))
        down = self.param("down", output, (self.experts, self.hidden, width))
        weights = tap(f"{site}.router", route(matmul(x, router).astype(jnp.float32), self.chosen))
        pre = tap(f"{site}.pre", jnp.einsum("blw,ewh->bleh", x, gate))
        post = ACTIVATIONS[self.activation](pre) * jnp.einsum("blw,ewh->bleh", x, up)
        post = tap(f"{site}.post", post)
        return tap(f"{site}.out", jnp.einsum("bleh,ehw,ble->blw", post, down, weights.astype(x.dtype)))
