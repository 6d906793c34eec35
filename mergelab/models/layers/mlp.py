"""Feed-forward layers: dense, gated, and mixtures of experts; their activation functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mergelab.models.derived import param
from mergelab.models.layers.bfloat16_bits import StackedBits
from mergelab.models.layers.dense import Linear, matmul, scaled
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.sites import Tap

__all__ = ["ACTIVATIONS", "MLP", "Experts", "MLPSpec", "MixtureOfExperts", "route"]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


@dataclass(frozen=True)
class MLPSpec:
    """What the feed-forward layer of one block is.

    Attributes:
        hidden: number of neurons.
        activation: name of the activation function, one of `ACTIVATIONS`.
        gated: whether the activation gates a second projection.
        bias: whether the projections have biases.
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of one feed-forward layer.

    Attributes:
        count: number of experts.
        chosen: number of experts that each token uses.
        hidden: number of neurons of one expert.
        activation: name of the activation function, one of `ACTIVATIONS`.
        normalize: whether the weights of the chosen experts sum to 1; else they are a softmax over all.
    """

    count: int
    chosen: int
    hidden: int
    activation: str = "silu"
    normalize: bool = True


class MLP(nn.Module):
    """One feed-forward layer; the gated form is SwiGLU or GeGLU (Shazeer, arXiv:2002.05202).

    Sites, under the name it is called with: `input` (what the first projections read), `pre` (what enters
    the activation), `post` (what enters the output projection), `out`.

    Attributes:
        spec: its shape and settings.
        out_norm: norm of the output, or None.
        initial_gain: gain of the output projection's initial weights.
        out_scale: what the output is multiplied with before it is added to the stream (Granite).
    """

    spec: MLPSpec
    out_norm: NormKind | None = None
    initial_gain: float = 1.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], tap: Tap, site: str
    ) -> Float[Array, "batch length width"]:
        x = tap(f"{site}.input", x)
        spec, inward = self.spec, ("embed", "mlp")
        activate = ACTIVATIONS[spec.activation]
        if spec.gated:
            pre = tap(f"{site}.pre", Linear(spec.hidden, inward, spec.bias, name="gate")(x))
            post = activate(pre) * Linear(spec.hidden, inward, spec.bias, name="up")(x)
        else:
            post = activate(tap(f"{site}.pre", Linear(spec.hidden, inward, spec.bias, name="up")(x)))
        post = tap(f"{site}.post", post)
        out = Linear(x.shape[-1], ("mlp", "embed"), spec.bias, self.initial_gain, name="down")(post)
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", scaled(out, self.out_scale))


def route(
    logits: Float[Array, "batch length experts"], chosen: int, normalize: bool = True
) -> Float[Array, "batch length experts"]:
    """Softmax over the `chosen` largest logits of each token, zero elsewhere (Mixtral, arXiv:2401.04088).

    Args:
        logits: logits of the router, float32.
        chosen: number of experts per token.
        normalize: False for the softmax over all logits, of which the chosen ones are kept.
    """
    values, indices = jax.lax.top_k(logits, chosen)
    one_hot = jax.nn.one_hot(indices, logits.shape[-1], dtype=logits.dtype)
    weights = jax.nn.softmax(values, axis=-1)
    if not normalize:
        weights = jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return jnp.einsum("blc,blce->ble", weights, one_hot)


def _by_expert(
    x: Float[Array, "batch length width"],
    kernels: Float[Array, "experts width hidden"] | StackedBits,
    used: Bool[Array, " experts"],
) -> Float[Array, "batch length experts hidden"]:
    """Every token times every expert's kernel."""
    if not isinstance(kernels, StackedBits):
        return jnp.einsum("blw,ewh->bleh", x, kernels)
    found = kernels.products(x.reshape(-1, x.shape[-1]), used)
    return found.reshape(*x.shape[:2], *found.shape[1:])


def _combined(
    x: Float[Array, "batch length experts hidden"],
    kernels: Float[Array, "experts hidden width"] | StackedBits,
    weights: Float[Array, "batch length experts"],
    used: Bool[Array, " experts"],
) -> Float[Array, "batch length width"]:
    """What each expert makes of its own vectors, summed by weight."""
    if not isinstance(kernels, StackedBits):
        return jnp.einsum("bleh,ehw,ble->blw", x, kernels, weights)
    experts, hidden = x.shape[2:]
    found = kernels.mixture(x.reshape(-1, experts, hidden), weights.reshape(-1, experts), used)
    return found.reshape(*x.shape[:2], found.shape[-1])


class MixtureOfExperts(nn.Module):
    """Gated experts with stacked kernels `[experts, in, out]`, combined by the router's weights.

    Every expert sees every token and unchosen ones get weight zero: exact, differentiable, and it shards over
    the experts' axis with one sum; it costs `experts / chosen` times the arithmetic of a sparse dispatch. Of
    bfloat16 weights on a CPU (`StackedBits`) experts that no token has chosen are left out.

    Sites, under the name it is called with: `input`, `router` (the weights, `[batch, length, experts]`),
    `pre` and `post` (`[batch, length, experts, hidden]`), `out`.

    Attributes:
        spec: its shape and settings.
        out_norm: norm of the output, or None.
        initial_gain: gain of the output projections' initial weights.
        out_scale: what the output is multiplied with before it is added to the stream (Granite).
    """

    spec: Experts
    out_norm: NormKind | None = None
    initial_gain: float = 1.0
    out_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], tap: Tap, site: str
    ) -> Float[Array, "batch length width"]:
        x = tap(f"{site}.input", x)
        width, spec = x.shape[-1], self.spec
        stacked = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        output = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal", batch_axis=0)
        inward, outward = (spec.count, width, spec.hidden), (spec.count, spec.hidden, width)
        router = param(self, "router", nn.initializers.lecun_normal(), (width, spec.count), ("embed", None))
        gate = param(self, "gate", stacked, inward, ("experts", "embed", "mlp"))
        up = param(self, "up", stacked, inward, ("experts", "embed", "mlp"))
        down = param(self, "down", output, outward, ("experts", "mlp", "embed"))
        logits = matmul(x, router).astype(jnp.float32)
        weights = tap(f"{site}.router", route(logits, spec.chosen, spec.normalize))
        asked = tap.uses(f"{site}.pre") or tap.uses(f"{site}.post")
        used = (weights != 0).any((0, 1)) | asked
        pre = tap(f"{site}.pre", _by_expert(x, gate, used))
        post = ACTIVATIONS[spec.activation](pre) * _by_expert(x, up, used)
        post = tap(f"{site}.post", post)
        out = _combined(post, down, weights.astype(x.dtype), used)
        if self.out_norm is not None:
            out = Norm(self.out_norm, name="out_norm")(out)
        return tap(f"{site}.out", scaled(out, self.out_scale))
