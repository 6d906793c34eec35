"""JumpReLU: a learned threshold per latent, trained by straight-through estimators towards an L0.

Rajamanoharan et al., arXiv 2407.14435; the penalty is their appendix's, which aims at a number of active
latents instead of pushing it down for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from mergelab.errors import SAEError
from mergelab.sae.kernels.codes import DenseCodes
from mergelab.sae.kernels.largest import pre_activations
from mergelab.sae.variants.relu import warmed
from mergelab.sae.variants.variant import Context, Encoded, Params, Variant, live_bias

__all__ = ["JumpReLU", "jump_relu", "step"]


def _near(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """A rectangular kernel of width `bandwidth` around the threshold, of integral 1."""
    return (jnp.abs(pre - threshold) < bandwidth / 2).astype(pre.dtype) / bandwidth


def step(pre: Array, threshold: Array, bandwidth: float) -> Array:
    """`1 if pre > threshold else 0`, with a kernel estimate of its gradient in the threshold.

    Args:
        pre: `[tokens, n]`.
        threshold: `[1, n]`.
        bandwidth: of the kernel.
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


@dataclass(frozen=True)
class JumpReLU(Variant):
    """`z = pre * (pre > threshold)`, loss `nmse + sparsity * (L0 / l0 - 1)^2`.

    Attributes:
        l0: how many latents should be active per token.
        sparsity: the penalty's coefficient.
        sparsity_warmup: part of the training over which it rises from 0.
        bandwidth: of the straight-through estimators, for inputs of unit variance per coordinate.
        initial_threshold: of every latent.
    """

    l0: float = 32.0
    sparsity: float = 1.0
    sparsity_warmup: float = 0.1
    bandwidth: float = 0.1
    initial_threshold: float = 0.1

    name: ClassVar[str] = "jump_relu"
    revives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.l0 <= self.n_latents:
            raise SAEError(f"l0 is {self.l0}; it must be above 0 and at most n_latents={self.n_latents}.")
        if min(self.bandwidth, self.initial_threshold) <= 0:
            raise SAEError("bandwidth and initial_threshold of a JumpReLU must be above 0.")

    def own_params(self) -> Params:
        return {"log_threshold": jnp.full(self.n_latents, jnp.log(self.initial_threshold), jnp.float32)}

    def encode(self, params: Params, x: Array, context: Context) -> Encoded:
        pre = pre_activations(x, params["encoder"], live_bias(params, context), context.compute_dtype)
        pre = jnp.maximum(pre, 0)
        threshold = jnp.exp(params["log_threshold"])[None, :]
        shards = context.shards
        active = context.mean(step(pre, threshold, self.bandwidth).sum(axis=1))
        # (L0 / l0 - 1)^2 of the whole batch, so written that each device has its share of the gradient.
        l0 = shards.sum_all(active)
        slope = 2 * (l0 / self.l0 - 1) / self.l0
        value = (l0 / self.l0 - 1) ** 2 / shards.num_data_shards()
        share = shards.join_latents(slope * active)
        penalty = value + share - jax.lax.stop_gradient(share)
        penalty = warmed(self.sparsity, self.sparsity_warmup, context.progress) * penalty
        return Encoded(DenseCodes(jump_relu(pre, threshold, self.bandwidth), shards), penalty)

    def export(self, params: Params, statistics: Mapping[str, Array]) -> dict[str, Any]:
        return {"activation": "jump_relu", "threshold": jnp.exp(params["log_threshold"])}
