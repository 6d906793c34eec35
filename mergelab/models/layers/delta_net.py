"""Gated delta nets: layers that keep one matrix a head in place of keys and values (arXiv:2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from mergelab.models.cache import Recurrent, State
from mergelab.models.derived import param
from mergelab.models.layers.dense import Linear
from mergelab.models.layers.linear_recurrence import read_memory
from mergelab.models.layers.norms import Norm, NormKind
from mergelab.models.layers.short_convolution import ShortConvolution
from mergelab.models.sites import Tap

__all__ = ["DeltaNet", "DeltaNetSpec"]


@dataclass(frozen=True)
class DeltaNetSpec:
    """What a gated delta net is.

    Attributes:
        key_heads: heads of queries and keys; consecutive groups of value heads share one.
        value_heads: heads of values, each with a memory of its own.
        key_dim, value_dim: width of a head of queries and keys, and of values.
        taps: number of tokens that the convolutions see.
        eps: added to the mean square in the norm of what is read.
        key_eps: added to the squared length of queries and keys.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    eps: float = 1e-6
    key_eps: float = 1e-6

    @property
    def kept(self) -> Recurrent:
        """What a cache keeps of each row."""
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return Recurrent((self.taps - 1, channels), (self.value_heads, self.key_dim, self.value_dim))

    def outline(self) -> DeltaNetSpec:
        """The same without what changes neither parameters nor sites."""
        return replace(self, eps=1e-6, key_eps=1e-6)

    def module(self, gain: float, name: str) -> DeltaNet:
        """The flax module; `gain` is the initial gain of what it adds to the stream."""
        return DeltaNet(self, gain, name=name)


class DeltaNet(nn.Module):
    """Queries, keys and values of short convolutions; a memory that the delta rule writes; a gated norm.

    Sites, under the name it is called with: `input` (what the projections read), `v`, `q`, `k` (of length 1;
    queries over `sqrt(key_dim)`), `decay` (logarithm of what remains of the memory at each token), `strength`
    (how much of what the memory lacks is written), `read` (what the memory gives each head), `z` (normalized
    and gated: what the output projection reads), `out`.

    Attributes:
        spec: its shape and settings.
        initial_gain: gain of the output projection's initial weights.
    """

    spec: DeltaNetSpec
    initial_gain: float = 1.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        real: Bool[Array, "batch length"] | None,
        state: State,
        tap: Tap,
        site: str,
    ) -> tuple[Float[Array, "batch length width"], State]:
        """Returns what is added to the residual stream, and the state after the last token."""
        x = tap(f"{site}.input", x)
        spec, width = self.spec, x.shape[-1]
        window, memory = state

        def project(name: str, features: int) -> Float[Array, "batch length features"]:
            return Linear(features, ("embed", "heads"), name=name)(x)

        def heads(
            y: Float[Array, "batch length features"], count: int
        ) -> Float[Array, "batch length heads dim"]:
            return y.reshape(*x.shape[:2], count, -1)

        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        parts = {"q": project("q", keys), "k": project("k", keys), "v": project("v", values)}
        parts, window = ShortConvolution(spec.taps, name="conv")(parts, window, real)
        q, k = (heads(jax.nn.silu(parts[name]), spec.key_heads) for name in "qk")
        v = tap(f"{site}.v", heads(jax.nn.silu(parts["v"]), spec.value_heads))
        q = tap(f"{site}.q", _unit(q, spec.key_eps) * spec.key_dim**-0.5)
        k = tap(f"{site}.k", _unit(k, spec.key_eps))

        rate = param(self, "a_log", _initial_rate, (spec.value_heads,), ("heads",)).astype(jnp.float32)
        shift = param(self, "step_bias", nn.initializers.ones, (spec.value_heads,), ("heads",))
        step = project("step", spec.value_heads).astype(jnp.float32) + shift.astype(jnp.float32)[None, None]
        decay = tap(f"{site}.decay", -jnp.exp(rate)[None, None] * jax.nn.softplus(step))
        strength = tap(f"{site}.strength", jax.nn.sigmoid(project("strength", spec.value_heads)))
        read, memory = read_memory(q, k, v, decay, memory, real, strength)
        read = tap(f"{site}.read", read.astype(x.dtype))

        normed = Norm(NormKind("rms", spec.eps), None, name="norm")(read)
        gate = heads(project("gate", values), spec.value_heads).astype(jnp.float32)
        z = tap(f"{site}.z", (normed * jax.nn.silu(gate)).astype(x.dtype))
        output = Linear(width, ("heads", "embed"), False, self.initial_gain, name="o")
        return tap(f"{site}.out", output(z.reshape(*x.shape[:2], -1))), (window, memory)


def _unit(x: Float[Array, "*shape dim"], eps: float) -> Float[Array, "*shape dim"]:
    """Vectors of length 1, computed in float32."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + eps)


def _initial_rate(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0))
