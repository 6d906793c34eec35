"""Dense layers: one 2-D product with the kernel `[in, out]`, and an optional bias."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Float

__all__ = ["Linear", "matmul"]


def matmul(
    x: Float[Array, "batch length width"], kernel: Float[Array, "width features"]
) -> Float[Array, "batch length features"]:
    """`x @ kernel`, as one 2-D product: on CPU its gradient is twice as fast as that of a 3-D one."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `[in, out]`.

    Attributes:
        features: width of the output.
        bias: whether there is a bias.
        initial_gain: the initial kernel is normal with deviation `initial_gain / sqrt(in)`.
    """

    features: int
    bias: bool = False
    initial_gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length features"]:
        initial = nn.initializers.variance_scaling(self.initial_gain**2, "fan_in", "normal")
        y = matmul(x, self.param("kernel", initial, (x.shape[-1], self.features)))
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))[None, None]
        return y
