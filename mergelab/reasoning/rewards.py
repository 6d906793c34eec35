"""Rewards of attempts, and the objectives that train on them: pure functions, differentiable and jittable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mergelab.errors import TuningError

__all__ = [
    "clipped_fraction",
    "clipped_objective",
    "group_advantages",
    "kl_estimate",
    "length_penalized_reward",
    "relative_length_reward",
]


def length_penalized_reward(
    correct: ArrayLike, lengths: ArrayLike, *, budget: float, strength: float = 0.5
) -> Float[Array, "*batch"]:
    """`correct * (1 - strength * min(length / budget, 1))`: a wrong answer earns 0 however short it is.

    A penalty on wrong answers too would pay for giving up early.

    Args:
        correct: 1 or True for right answers, `[...]`; fractions for those that are partly right.
        lengths: number of tokens of each attempt, `[...]`.
        budget: number of tokens at which the penalty is whole.
        strength: reward that a right answer of that length loses, from 0 to 1.

    Raises:
        TuningError: the budget is not positive, or the strength is not within 0 and 1.
    """
    _require("budget", budget, budget > 0, "a number above 0")
    _require("strength", strength, 0 <= strength <= 1, "a number from 0 to 1")
    right, used = _floats(correct), _floats(lengths)
    return right * (1 - strength * jnp.minimum(used / budget, 1))


def relative_length_reward(
    correct: ArrayLike, lengths: ArrayLike, *, strength: float = 0.4, eps: float = 1e-6
) -> Float[Array, "*groups attempts"]:
    """`correct * (1 - strength * sigmoid((length - mean) / std))`, mean and deviation of the right attempts.

    The lengths of one prompt's attempts are compared with each other, so that hard prompts may take long
    (Arora & Zanette 2025, arXiv:2502.04463).

    Args:
        correct: 1 or True for right answers, `[..., attempts]`; the last axis are attempts at one prompt.
        lengths: number of tokens, of the same shape.
        strength: reward that a right answer loses at most, from 0 to below 1.
        eps: what is added to the deviation.

    Raises:
        TuningError: the strength is not within 0 and 1.
    """
    _require("strength", strength, 0 <= strength < 1, "a number from 0 to below 1")
    right, used = _floats(correct), _floats(lengths)
    count = jnp.maximum(right.sum(axis=-1, keepdims=True), 1)
    mean = (right * used).sum(axis=-1, keepdims=True) / count
    deviation = jnp.sqrt((right * jnp.square(used - mean)).sum(axis=-1, keepdims=True) / count)
    return right * (1 - strength * jax.nn.sigmoid((used - mean) / (deviation + eps)))


def group_advantages(
    rewards: ArrayLike, *, scaled: bool = True, eps: float = 1e-4
) -> Float[Array, "*groups attempts"]:
    """`(r - mean) / (std + eps)` over the attempts at one prompt: GRPO's advantages (arXiv:2402.03300).

    The deviation is that of a sample (divided by `n - 1`). Where all attempts earn the same, all advantages
    are 0, and the prompt teaches nothing.

    Args:
        rewards: `[..., attempts]`, at least two attempts.
        scaled: whether to divide by the deviation; not doing so gives no weight to prompts that are nearly
            always or nearly never solved (Dr. GRPO, arXiv:2503.20783).
        eps: what is added to the deviation.

    Raises:
        TuningError: there are fewer than two attempts.
    """
    earned = _floats(rewards)
    attempts = earned.shape[-1] if earned.ndim else 0
    _require("group_advantages(rewards)", list(earned.shape), attempts >= 2, "[..., attempts], 2 or more")
    centered = earned - earned.mean(axis=-1, keepdims=True)
    if not scaled:
        return centered
    # The gradient of a root at 0 is not a number: equal rewards are divided by eps alone.
    variance = jnp.square(centered).sum(axis=-1, keepdims=True) / (attempts - 1)
    spread = variance > 0
    return centered / (jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0) + eps)


def clipped_objective(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Float[Array, "*tokens"]:
    """`min(w A, clamp(w, 1 - clip, 1 + clip_high) A)` with `w = p / p_old`: PPO's, to be maximized.

    Schulman et al. 2017 (arXiv:1707.06347). Its gradient is 0 where the ratio has already gone beyond the
    bound in the direction that the advantage asks for.

    Args:
        log_probs: log-probability of each token (or attempt) now.
        old_log_probs: the same of the policy that drew it; a constant.
        advantages: how much better it was than expected, of the same shape.
        clip: how far a ratio may fall below 1.
        clip_high: how far it may rise above 1; `clip` if None (DAPO takes more, arXiv:2503.14476).

    Returns:
        One number for each token; take the mean over those that count.

    Raises:
        TuningError: a bound is negative.
    """
    low, high = _bounds(clip, clip_high)
    ratio = _ratio(log_probs, old_log_probs)
    gain = _floats(advantages)
    return jnp.minimum(ratio * gain, jnp.clip(ratio, low, high) * gain)


def clipped_fraction(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Float[Array, ""]:
    """Fraction of the tokens whose gradient the clip takes away; arguments as of `clipped_objective`."""
    low, high = _bounds(clip, clip_high)
    ratio, gain = _ratio(log_probs, old_log_probs), _floats(advantages)
    return (((gain > 0) & (ratio > high)) | ((gain < 0) & (ratio < low))).astype(jnp.float32).mean()


def kl_estimate(log_probs: ArrayLike, reference_log_probs: ArrayLike) -> Float[Array, "*tokens"]:
    """`q / p - log(q / p) - 1` of drawn tokens: an unbiased, never negative estimate of `KL(p || q)`.

    Schulman's third estimator, the one in GRPO's objective. Its mean over tokens drawn from `p` is the
    divergence from the reference `q`.

    Args:
        log_probs: log-probability of each token under the policy it was drawn from.
        reference_log_probs: the same under the reference.
    """
    log_ratio = _floats(reference_log_probs) - _floats(log_probs)
    return jnp.expm1(log_ratio) - log_ratio


def _bounds(clip: float, clip_high: float | None) -> tuple[float, float]:
    high = clip if clip_high is None else clip_high
    _require("clip", (clip, high), clip >= 0 and high >= 0, "bounds of 0 or more")
    return 1 - clip, 1 + high


def _ratio(log_probs: ArrayLike, old_log_probs: ArrayLike) -> Array:
    return jnp.exp(_floats(log_probs) - jax.lax.stop_gradient(_floats(old_log_probs)))


def _floats(values: ArrayLike) -> Array:
    return jnp.asarray(values).astype(jnp.float32)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise TuningError(f"{name} is {value!r}, but needs {expected}.")
