"""Mamba layers, 1 and 2: a convolution, a recurrence whose steps the tokens choose, and a gate."""

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
from mergelab.models.layers.selective_scan import selective_scan
from mergelab.models.layers.short_convolution import ShortConvolution
from mergelab.models.sites import Tap

__all__ = ["Mamba", "Mamba2", "Mamba2Spec", "MambaSpec"]


@dataclass(frozen=True)
class MambaSpec:
    """What a Mamba layer is (arXiv:2312.00752).

    Attributes:
        channels: number of channels, each with a memory of `numbers`.
        numbers: numbers that a channel keeps.
        rank: width of the vector that the channels' steps are made of.
        taps: number of tokens that the convolution sees.
        bias: whether the projections of the stream have biases.
        conv_bias: whether the convolution has one.
        norm: norm of what steps, writing and reading are made of, or None (Jamba has one).
    """

    channels: int
    numbers: int
    rank: int
    taps: int = 4
    bias: bool = False
    conv_bias: bool = True
    norm: NormKind | None = None

    @property
    def kept(self) -> Recurrent:
        """What a cache keeps of each row."""
        return Recurrent((self.taps - 1, self.channels), (self.channels, self.numbers))

    def outline(self) -> MambaSpec:
        """The same without what changes neither parameters nor sites."""
        return self

    def module(self, gain: float, name: str) -> Mamba:
        """The flax module; `gain` is the initial gain of what it adds to the stream."""
        return Mamba(self, gain, name=name)


class Mamba(nn.Module):
    """A selective state space whose channels fade at rates of their own.

    Sites, under the name it is called with: `input`, `x` (what is written, after the convolution),
    `step_latent` (what steps are made of), `b` and `c` (how numbers are written and read), `step` (how far
    each channel moves), `read` (what the memory gives, with `x` by its side), `z` (gated: what the output
    projection reads), `out`.

    Attributes:
        spec: its shape and settings.
        initial_gain: gain of the output projection's initial weights.
    """

    spec: MambaSpec
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
        stream = tap(f"{site}.input", x)
        spec, width = self.spec, x.shape[-1]
        window, memory = state

        def made(name: str, features: int) -> Float[Array, "batch length features"]:
            y = Linear(features, ("heads", None), name=name)(x)
            y = y if spec.norm is None else Norm(spec.norm, None, name=f"{name}_norm")(y)
            return tap(f"{site}.{name}", y)

        inward = ("embed", "heads")
        x = Linear(spec.channels, inward, spec.bias, name="x")(stream)
        gate = Linear(spec.channels, inward, spec.bias, name="gate")(stream)
        parts, window = ShortConvolution(spec.taps, spec.conv_bias, name="conv")({"x": x}, window, real)
        x = tap(f"{site}.x", jax.nn.silu(parts["x"]))
        latent, into, out = made("step_latent", spec.rank), made("b", spec.numbers), made("c", spec.numbers)
        step = jax.nn.softplus(Linear(spec.channels, (None, "heads"), True, name="step")(latent))
        step = tap(f"{site}.step", step)
        shape = (spec.channels, spec.numbers)
        rate = -jnp.exp(param(self, "a_log", _counted, shape, ("heads", None)).astype(jnp.float32))
        past = param(self, "skip", nn.initializers.ones, (spec.channels,), ("heads",)).astype(jnp.float32)
        read, memory = selective_scan(x, step, rate, into, out, memory, real)
        read = tap(f"{site}.read", (read + past[None, None] * x.astype(jnp.float32)).astype(x.dtype))
        z = tap(f"{site}.z", read * jax.nn.silu(gate))
        output = Linear(width, ("heads", "embed"), spec.bias, self.initial_gain, name="o")
        return tap(f"{site}.out", output(z)), (window, memory)


@dataclass(frozen=True)
class Mamba2Spec:
    """What a Mamba 2 layer is (arXiv:2405.21060).

    Attributes:
        heads: number of heads, each with a memory of its own.
        head_dim: width of what a head writes.
        numbers: width of what addresses it.
        groups: groups of heads that share what addresses them, and that are normalized together.
        taps: number of tokens that the convolutions see.
        bias: whether the projections of the stream have biases.
        conv_bias: whether the convolutions have.
        eps: added to the mean square in the norm.
        least_step, largest_step: bounds of the steps.
    """

    heads: int
    head_dim: int
    numbers: int
    groups: int = 1
    taps: int = 4
    bias: bool = False
    conv_bias: bool = True
    eps: float = 1e-5
    least_step: float = 0.0
    largest_step: float = float("inf")

    @property
    def channels(self) -> int:
        """Width of what all heads write."""
        return self.heads * self.head_dim

    @property
    def kept(self) -> Recurrent:
        """What a cache keeps of each row."""
        convolved = self.channels + 2 * self.groups * self.numbers
        return Recurrent((self.taps - 1, convolved), (self.heads, self.numbers, self.head_dim))

    def outline(self) -> Mamba2Spec:
        """The same without what changes neither parameters nor sites."""
        return replace(self, eps=1e-5, least_step=0.0, largest_step=float("inf"))

    def module(self, gain: float, name: str) -> Mamba2:
        """The flax module; `gain` is the initial gain of what it adds to the stream."""
        return Mamba2(self, gain, name=name)


class Mamba2(nn.Module):
    """A state space whose heads fade as a whole, so that a chunk of tokens is matrix products.

    Sites, under the name it is called with: `input`, `x` `[batch, length, heads, head_dim]` (what is written,
    after the convolution), `b` and `c` (what addresses and reads the memory), `step`, `read` (what the memory
    gives, with `x` by its side), `z` (gated and normalized: what the output projection reads), `out`.

    Attributes:
        spec: its shape and settings.
        initial_gain: gain of the output projection's initial weights.
    """

    spec: Mamba2Spec
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
        spec, width, dtype = self.spec, x.shape[-1], x.dtype
        rows = x.shape[:2]
        window, memory = state

        def project(name: str, features: int) -> Float[Array, "batch length features"]:
            return Linear(features, ("embed", "heads"), spec.bias, name=name)(x)

        def weights(name: str, features: int, initial: nn.initializers.Initializer) -> Array:
            return param(self, name, initial, (features,), ("heads",)).astype(jnp.float32)

        widths = {"x": spec.channels, "b": spec.groups * spec.numbers, "c": spec.groups * spec.numbers}
        parts = {name: project(name, features) for name, features in widths.items()}
        parts, window = ShortConvolution(spec.taps, spec.conv_bias, name="conv")(parts, window, real)
        heads = {"x": spec.heads, "b": spec.groups, "c": spec.groups}
        written, into, out = (
            tap(f"{site}.{name}", jax.nn.silu(part).reshape(*rows, heads[name], -1))
            for name, part in parts.items()
        )
        step = project("step", spec.heads).astype(jnp.float32)
        step = jax.nn.softplus(step + weights("step_bias", spec.heads, _initial_steps)[None, None])
        step = tap(f"{site}.step", jnp.clip(step, spec.least_step, spec.largest_step))
        rate = -jnp.exp(weights("a_log", spec.heads, _counted))
        wide = written.astype(jnp.float32)
        read, memory = read_memory(out, into, step[..., None] * wide, rate[None, None] * step, memory, real)
        past = weights("skip", spec.heads, nn.initializers.ones)
        read = tap(f"{site}.read", (read + past[None, None, :, None] * wide).astype(dtype))
        gated = read.reshape(*rows, -1).astype(jnp.float32) * jax.nn.silu(
            project("gate", spec.channels).astype(jnp.float32)
        )
        grouped = gated.reshape(*rows, spec.groups, -1)
        normed = Norm(NormKind("rms", spec.eps, scaled=False))(grouped).reshape(gated.shape)
        scale = weights("scale", spec.channels, nn.initializers.ones)
        z = tap(f"{site}.z", (normed * scale[None, None]).astype(dtype))
        output = Linear(width, ("heads", "embed"), spec.bias, self.initial_gain, name="o")
        return tap(f"{site}.out", output(z)), (window, memory)


def _counted(key: Array, shape: tuple[int, ...]) -> Array:
    """Rates 1, 2, ... along the last axis, as logarithms."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def _initial_steps(key: Array, shape: tuple[int, ...]) -> Array:
    """What softplus makes steps of, from 0.001 to 0.1, evenly in their logarithm."""
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, jnp.log(0.001), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))
