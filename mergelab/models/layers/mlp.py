"""Feed-forward layers: dense, gated, and mixtures of experts; their activation functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mergelab.models.layers.dense import Linear, matmul
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.sites import Tap

__all__ = ["ACTIVATIONS", "MLP", "MixtureOfExperts", "route"]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


class MLP(nn.Module):
    """One feed-forward layer; the gated form is SwiGLU or GeGLU (Shazeer, arXiv:2002.05202).

    Sites, under the name it is called with: `input` (what the first projections read), `pre` (what enters
    the activation), `post` (what enters the output projection), `out`.

    Attributes:
        hidden: number of neurons.
        activation: a name of `ACTIVATIONS`.
        gated: whether the activation gates a second projection.
        bias: whether the projections have biases.
        out_norm: a norm of the output (sandwich blocks), or None.
        initial_gain: of the output projection.
    """

    hidden: int
    activation: str
    gated: bool = True
    bias: bool = False
    out_norm: NormKind | None = None
    initial_gain: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], tap: Tap, site: str
    ) -> Float[Array, "batch length width"]:
        x = tap(f"{site}.input", x)
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            pre = tap(f"{site}.pre", Linear(self.hidden, self.bias, name="gate")(x))
            post = activate(pre) * Linear(self.hidden, self.bias, name="up")(x)
        else:
            post = activate(tap(f"{site}.pre", Linear(self.hidden, self.bias, name="up")(x)))
        post = tap(f"{site}.post", post)
        out = Linear(x.shape[-1], self.bias, self.initial_gain, name="down")(post)
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", out)


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

    Sites, under the name it is called with: `input`, `router` (the weights, `[batch, length, experts]`),
    `pre` and `post` (`[batch, length, experts, hidden]`), `out`.

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
        x = tap(f"{site}.input", x)
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
