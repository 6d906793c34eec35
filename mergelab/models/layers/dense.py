"""Tables of embeddings, and dense layers: one 2-D product with the kernel, and an optional bias."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mergelab.models.derived import param
from mergelab.models.layers.bfloat16_bits import Bits

__all__ = ["Embed", "Linear", "matmul", "scaled"]


def matmul(
    x: Float[Array, "batch length width"], kernel: Float[Array, "width features"] | Bits
) -> Float[Array, "batch length features"]:
    """`x @ kernel`, as one 2-D product: on CPU its gradient is twice as fast as that of a 3-D one."""
    rows = x.reshape(-1, x.shape[-1])
    product = kernel.product(rows) if isinstance(kernel, Bits) else rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """`x * factor`, in the dtype of `x`; `x` itself where the factor is 1."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `[in, out]`.

    Attributes:
        features: width of the output.
        axes: logical names of the input's and the output's axis, for sharding; None where never split.
        bias: whether there is a bias.
        initial_gain: the initial kernel is normal with deviation `initial_gain / sqrt(in)`.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = False
    initial_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length features"]:
        initial = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal")
        y = matmul(x, param(self, "kernel", initial, (x.shape[-1], self.features), self.axes))
        if self.bias:
            y = y + param(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])[None, None]
        return y


class Embed(nn.Module):
    """A table with one row per id, `[rows, width]`, of initial deviation 0.02.

    Attributes:
        rows: number of ids.
        width: width of a row, the residual stream's.
        axis: logical name of the rows' axis, for sharding; None where never split.
        width_axis: logical name of the other axis; None where a row is not a vector of the stream.
    """

    rows: int
    width: int
    axis: str | None = None
    width_axis: str | None = "embed"

    def setup(self) -> None:
        initial = nn.initializers.normal(0.02)
        self.embedding = param(
            self, "embedding", initial, (self.rows, self.width), (self.axis, self.width_axis)
        )

    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        if isinstance(self.embedding, Bits):
            return self.embedding.take(ids)
        return jnp.take(self.embedding, ids, axis=0)

    def scores(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length rows"]:
        """The product of every vector with every row: the logits of tied embeddings."""
        if isinstance(self.embedding, Bits):
            return self.embedding.scores(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.rows)
        return matmul(x, self.embedding.T)
