"""Feed-forward layers: plain (`down(f(up(x)))`) and gated (`down(f(gate(x)) * up(x))`)."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Float

from mergelab.models.layers.activations import ACTIVATIONS
from mergelab.models.layers.linear import Linear
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.sites import Tap

__all__ = ["MLP"]


class MLP(nn.Module):
    """One feed-forward layer; the gated form is SwiGLU or GeGLU (Shazeer, arXiv:2002.05202).

    Sites, under the name it is called with: `pre` (what enters the activation), `post` (what enters the
    output projection), `out`.

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
