"""Feed-forward layers, plain and gated; their activation functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from mergelab.models.layers.dense import Linear, scaled
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.sites import Tap

__all__ = ["ACTIVATIONS", "MLP", "MLPSpec"]


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
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
