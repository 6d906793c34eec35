"""Embeddings per layer: each token has a narrow vector for every block, beside its stream (Gemma 4 E2B)."""

from __future__ import annotations

from dataclasses import dataclass, field

from flax import linen as nn
from jaxtyping import Array, Float, Int

from mergelab.models.layers.dense import Embed, Linear, scaled
from mergelab.models.layers.mlp import ACTIVATIONS
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.sites import Tap

__all__ = ["PER_LAYER_PARTS", "PerLayer", "PerLayerGate", "per_layer_inputs"]

PER_LAYER_PARTS = ("layer_embed", "layer_projection", "layer_norm")
"""Roots of the parameters that `per_layer_inputs` makes."""

_Inputs = Float[Array, "batch length layers narrow"]


@dataclass(frozen=True)
class PerLayer:
    """The vectors that the blocks read beside the stream.

    Attributes:
        rows: number of token ids that have some.
        width: width of one.
        layers: number of blocks; a row of the table holds the vectors of all.
        norm: norm of what the stream gives them.
    """

    rows: int
    width: int
    layers: int
    norm: NormKind = field(default_factory=NormKind)


def per_layer_inputs(
    spec: PerLayer, tokens: Int[Array, "batch length"], x: Float[Array, "batch length width"]
) -> _Inputs:
    """Every block's vector of a token: `(table[token] * sqrt(width) + norm(P x / sqrt(d_model))) / sqrt(2)`.

    It makes modules in the scope of the module that calls it.
    """
    shape, size = (*tokens.shape, spec.layers, spec.width), spec.layers * spec.width
    own = scaled(Embed(spec.rows, size, "vocab", None, name="layer_embed")(tokens), spec.width**0.5)
    seen = scaled(Linear(size, ("embed", None), name="layer_projection")(x), x.shape[-1] ** -0.5)
    normed = Norm(spec.norm, None, name="layer_norm")(seen.reshape(shape))
    return scaled(normed + own.reshape(shape), 2.0**-0.5)


class PerLayerGate(nn.Module):
    """What a block adds of its own vector, gated by the stream: `norm(down(act(gate(x)) * vector))`.

    Sites, under the name it is called with: `vector`, `input` (what the gate reads), `pre` (what enters the
    activation), `post` (what enters the output projection), `out`.

    Attributes:
        activation: name of the activation function.
        norm: norm of the output.
        initial_gain: gain of the output projection's initial weights.
    """

    activation: str
    norm: NormKind
    initial_gain: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        vector: Float[Array, "batch length narrow"],
        tap: Tap,
        site: str,
    ) -> Float[Array, "batch length width"]:
        vector, x = tap(f"{site}.vector", vector), tap(f"{site}.input", x)
        pre = tap(f"{site}.pre", Linear(vector.shape[-1], ("embed", "mlp"), name="gate")(x))
        post = tap(f"{site}.post", ACTIVATIONS[self.activation](pre) * vector)
        out = Linear(x.shape[-1], ("mlp", "embed"), False, self.initial_gain, name="down")(post)
        return tap(f"{site}.out", Norm(self.norm, name="out_norm")(out))
