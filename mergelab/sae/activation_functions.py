"""Activation functions of SAEs: from pre-activations to codes, one frozen object each.

Training and finished SAEs use the same objects. A function is named in `ACTIVATION_FUNCTIONS`; its fields are
what it needs besides pre-activations, under the names that an SAE and its configuration give them. Codes may
have either sign: what counts as active is `is_active`, and nothing else decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mergelab.errors import SAEError
from mergelab.sae.kernels.codes import is_active
from mergelab.sae.kernels.largest import kth_largest, top_k_by

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "AbsTopKFunction",
    "ActivationFunction",
    "BatchTopKFunction",
    "GatedFunction",
    "GroupMaxFunction",
    "JumpReLUFunction",
    "ReLUFunction",
    "TopKFunction",
    "is_active",
    "jump_relu",
    "step",
]


@dataclass(frozen=True)
class ActivationFunction:
    """Base of all activation functions; fields without a default are read from the SAE."""

    name: ClassVar[str]
    """Value of `activation` in a configuration."""
    score: ClassVar[Callable[[Array], Array] | None] = None
    """Ranks pre-activations where only the largest are kept; None ranks by their value."""
    signed: ClassVar[bool] = False
    """Whether codes have either sign, so that a latent stands for a direction and its opposite."""

    @staticmethod
    def kept(pre: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The code of a latent that is kept."""
        return jnp.maximum(pre, 0)

    def codes(self, pre: Float[Array, "tokens n"]) -> Float[Array, "tokens n"]:
        """The codes, dense."""
        raise NotImplementedError

    def pairs(self, pre: Float[Array, "tokens n"]) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        """The codes as values and latents, for functions that keep k latents of each token.

        Raises:
            SAEError: the number of active latents varies.
        """
        raise SAEError(f"only top-k SAEs have k codes per token; this is {self.name!r}.")

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        """Names of what the function takes from an SAE: `k`, or arrays."""
        return tuple(field.name for field in fields(cls) if field.default is MISSING)


@dataclass(frozen=True)
class ReLUFunction(ActivationFunction):
    """`max(pre, 0)`."""

    name: ClassVar[str] = "relu"

    def codes(self, pre: Float[Array, "tokens n"]) -> Float[Array, "tokens n"]:
        return self.kept(pre)


@dataclass(frozen=True)
class TopKFunction(ActivationFunction):
    """The k largest pre-activations of each token, rectified (arXiv 2406.04093).

    Attributes:
        k: latents per token.
    """

    k: int

    name: ClassVar[str] = "topk"

    def codes(self, pre: Float[Array, "tokens n"]) -> Float[Array, "tokens n"]:
        values, indices = self.pairs(pre)
        rows = jnp.arange(pre.shape[0])[:, None]
        return jnp.zeros_like(pre).at[rows, indices].set(values)

    def pairs(self, pre: Float[Array, "tokens n"]) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        values, indices = top_k_by(self.score, pre, self.k)
        return self.kept(values), indices


@dataclass(frozen=True)
class AbsTopKFunction(TopKFunction):
    """The k pre-activations of largest absolute value, signs kept (AbsTopK, arXiv 2510.00404).

    A latent then stands for a direction and its opposite.
    """

    name: ClassVar[str] = "abs_topk"
    signed: ClassVar[bool] = True
    score: ClassVar[Callable[[Array], Array] | None] = staticmethod(jnp.abs)

    @staticmethod
    def kept(pre: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return pre


@dataclass(frozen=True)
class GroupMaxFunction(TopKFunction):
    """The largest pre-activation of each of k groups of neighboring latents, rectified.

    The `groupmax` of sparsify; the number of latents is a multiple of k.
    """

    name: ClassVar[str] = "group_max"

    def pairs(self, pre: Float[Array, "tokens n"]) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        size = pre.shape[1] // self.k
        groups = pre.reshape(-1, self.k, size)
        first = size * jnp.arange(self.k, dtype=jnp.int32)
        return self.kept(groups.max(axis=2)), jnp.argmax(groups, axis=2).astype(jnp.int32) + first[None, :]


@dataclass(frozen=True)
class JumpReLUFunction(ActivationFunction):
    """`pre` where it is above a threshold of its latent, else 0 (arXiv 2407.14435).

    Attributes:
        threshold: `[n]`.
        bandwidth: width of the kernel that estimates the gradient in the threshold while it is trained; 0
            gives it none.
    """

    threshold: Float[Array, " n"]
    bandwidth: float = 0.0

    name: ClassVar[str] = "jump_relu"

    def codes(self, pre: Float[Array, "tokens n"]) -> Float[Array, "tokens n"]:
        threshold = self.threshold[None, :]
        if self.bandwidth:
            return jump_relu(self.kept(pre), threshold, self.bandwidth)
        return jnp.where(pre > threshold, self.kept(pre), 0)


@dataclass(frozen=True)
class BatchTopKFunction(JumpReLUFunction):
    """The largest of a batch while training, then those above a threshold (arXiv 2412.06410)."""

    name: ClassVar[str] = "batch_topk"

    @classmethod
    def of_batch(
        cls, pre: Float[Array, "tokens n"], kept: int | Array, count: Callable[[Array], Array]
    ) -> tuple[Float[Array, "tokens n"], Float[Array, "1 1"]]:
        """The codes of a batch, and the smallest of them.

        Args:
            pre: pre-activations.
            kept: codes to keep in the whole batch; those equal to the smallest are kept too.
            count: sums flags over the whole batch, keeping dimensions (`kth_largest`).
        """
        dense = cls.kept(pre)
        smallest = kth_largest(dense, kept, count)
        return jnp.where(dense >= smallest, dense, 0), smallest


@dataclass(frozen=True)
class GatedFunction(ActivationFunction):
    """One path decides which latents are active, another how much (arXiv 2404.16014).

    `pre = p + b_enc` is the gate; an open one has the code `relu(exp(magnitude_scale) p + magnitude_bias)`.

    Attributes:
        b_enc: `[n]`, the gate's bias.
        magnitude_scale: `[n]`.
        magnitude_bias: `[n]`.
    """

    b_enc: Float[Array, " n"]
    magnitude_scale: Float[Array, " n"]
    magnitude_bias: Float[Array, " n"]

    name: ClassVar[str] = "gated"

    def codes(self, pre: Float[Array, "tokens n"]) -> Float[Array, "tokens n"]:
        size = jnp.exp(self.magnitude_scale)[None, :] * (pre - self.b_enc[None, :])
        return jnp.where(pre > 0, self.kept(size + self.magnitude_bias[None, :]), 0)


ACTIVATION_FUNCTIONS: Mapping[str, type[ActivationFunction]] = {
    kind.name: kind
    for kind in (
        TopKFunction,
        BatchTopKFunction,
        JumpReLUFunction,
        ReLUFunction,
        GatedFunction,
        AbsTopKFunction,
        GroupMaxFunction,
    )
}
"""Activation functions by the name a configuration gives them."""


def _near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """A rectangular kernel of width `bandwidth` around the threshold, of integral 1."""
    return (jnp.abs(pre - threshold) < bandwidth / 2).astype(pre.dtype) / bandwidth


def step(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """`1 if pre > threshold else 0`, with a kernel estimate of its gradient in the threshold.

    Args:
        pre: `[tokens, n]`.
        threshold: `[1, n]`.
        bandwidth: width of the kernel.
    """
    return cast(Array, _step(pre, threshold, bandwidth))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _step(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return (pre > threshold).astype(pre.dtype)


def _step_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    pre, threshold = saved
    return jnp.zeros_like(pre), -(g * _near(pre, threshold, bandwidth)).sum(axis=0, keepdims=True)


_step.defvjp(lambda pre, threshold, width: (_step(pre, threshold, width), (pre, threshold)), _step_backward)


def jump_relu(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """`pre if pre > threshold else 0`, with a kernel estimate of its gradient in the threshold."""
    return cast(Array, _jump(pre, threshold, bandwidth))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _jump(pre: Array, threshold: Array, bandwidth: float) -> Array:
    return jnp.where(pre > threshold, pre, 0)


def _jump_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    pre, threshold = saved
    wanted = -(g * threshold * _near(pre, threshold, bandwidth)).sum(axis=0, keepdims=True)
    return jnp.where(pre > threshold, g, 0), wanted


_jump.defvjp(lambda pre, threshold, width: (_jump(pre, threshold, width), (pre, threshold)), _jump_backward)
