"""What a mixture of experts is, and which experts each token uses with what weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Experts", "choose", "spread"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of one feed-forward layer.

    Attributes:
        count: number of experts.
        chosen: number of experts that each token uses.
        hidden: number of neurons of one expert.
        activation: name of the activation function, one of `mlp.ACTIVATIONS`.
        normalize: whether the weights of the chosen experts sum to 1; else they are a softmax over all.
        scoring: what makes weights of the router's logits.
        groups, chosen_groups: groups of experts, and how many of them a token may choose from.
        weight_scale: what the weights are multiplied with.
        correction: whether each expert has a number that is added to its score for the choice alone.
        precise: whether the router computes in float32 whatever the weights are (DeepSeek).
        router_bias: whether the router has a bias.
        bias: whether the experts' projections have biases.
        limit: if given, gates are at most that and what they gate is within it, plus 1 (gpt-oss).
        shared: neurons of a layer that every token passes beside its experts; 0 if there is none.
        shared_gate: whether that layer's output is gated by a sigmoid of its input (Qwen 2 MoE).
        packed: whether files hold the experts of a layer in one tensor, where they may hold each by itself.
    """

    count: int
    chosen: int
    hidden: int
    activation: str = "silu"
    normalize: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    chosen_groups: int = 1
    weight_scale: float = 1.0
    correction: bool = False
    precise: bool = False
    router_bias: bool = False
    bias: bool = False
    limit: float | None = None
    shared: int = 0
    shared_gate: bool = False
    packed: bool = False

    def outline(self) -> Experts:
        """The same without what changes neither parameters nor sites."""
        return replace(
            self,
            chosen=1,
            normalize=True,
            scoring="softmax",
            groups=1,
            chosen_groups=1,
            weight_scale=1.0,
            precise=False,
            limit=None,
        )


def choose(
    logits: Float[Array, "batch length experts"],
    routing: Experts,
    correction: Float[Array, " experts"] | None = None,
) -> tuple[Float[Array, "batch length chosen"], Int[Array, "batch length chosen"]]:
    """Weights and numbers of the experts that each token uses.

    The weights are a softmax over the chosen logits (Mixtral, arXiv:2401.04088), or over all (`normalize`
    False), or sigmoids that are chosen by their sum with a correction and divided by their own sum (DeepSeek
    V3, arXiv:2412.19437). Where experts are in groups, only those of the best groups can be chosen: of the
    groups with the largest score (DeepSeek V2, arXiv:2405.04434), or sum of two scores (V3).

    Args:
        logits: logits of the router, float32.
        routing: how to choose.
        correction: what is added to the sigmoids for the choice alone.
    """
    if routing.scoring == "softmax":
        values, indices = jax.lax.top_k(_in_best_groups(logits, routing, of=1), routing.chosen)
        if routing.normalize:
            weights = jax.nn.softmax(values, axis=-1)
        else:
            weights = jnp.exp(values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        return weights * routing.weight_scale, indices
    scores = jax.nn.sigmoid(logits)
    ranked = scores if correction is None else scores + correction[None, None]
    _, indices = jax.lax.top_k(_in_best_groups(ranked, routing, of=2), routing.chosen)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if routing.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * routing.weight_scale, indices


def _in_best_groups(
    scores: Float[Array, "batch length experts"], routing: Experts, of: int
) -> Float[Array, "batch length experts"]:
    """The scores, those of all but the best groups replaced by the least float."""
    if routing.groups == routing.chosen_groups:
        return scores
    batch, length, experts = scores.shape
    grouped = scores.reshape(batch, length, routing.groups, -1)
    best = jax.lax.top_k(grouped, min(of, grouped.shape[-1]))[0].sum(axis=-1)
    _, kept = jax.lax.top_k(best, routing.chosen_groups)
    open_ = jax.nn.one_hot(kept, routing.groups, dtype=scores.dtype).sum(axis=-2) > 0
    least = jnp.finfo(scores.dtype).min
    return jnp.where(open_[..., None], grouped, least).reshape(batch, length, experts)


def spread(
    weights: Float[Array, "batch length chosen"], indices: Int[Array, "batch length chosen"], count: int
) -> Float[Array, "batch length experts"]:
    """The weight of each expert: zero for those that a token does not use."""
    return jnp.einsum("blc,blce->ble", weights, jax.nn.one_hot(indices, count, dtype=weights.dtype))
