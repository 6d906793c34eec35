"""Scores a language model in bits per UTF-8 byte of held-out text, which no tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from mergelab.text.packing import EvaluationWindows

__all__ = ["bits_per_byte", "summed_loss"]

Params = Any
Apply = Callable[[Params, Int[Array, "batch length"]], Float[Array, "batch length vocab"]]
SummedLoss = Callable[[Params, np.ndarray, np.ndarray], Float[Array, ""]]


def summed_loss(apply: Apply) -> SummedLoss:
    """Compiles `(params, windows, is_target) -> sum of -ln p(target)`; one program for all models."""

    @jax.jit
    def loss(
        params: Params, windows: Int[Array, "batch length_plus_1"], is_target: Bool[Array, "batch length"]
    ) -> Float[Array, ""]:
        logits = apply(params, windows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return jnp.sum(jnp.where(is_target, nats, 0.0))

    return loss


def bits_per_byte(loss: SummedLoss, params: Params, windows: EvaluationWindows, batch: int = 32) -> float:
    """`sum over tokens of -log2 p(token | the tokens before it in its window) / UTF-8 bytes of the text`.

    Args:
        loss: what `summed_loss` returns.
        params: the model's parameters.
        windows: text of which every token is a target once.
        batch: windows evaluated at a time; the last batch is filled with rows that count nothing.
    """
    nats = 0.0
    for start in range(0, len(windows.tokens), batch):
        tokens = windows.tokens[start : start + batch]
        is_target = windows.is_target[start : start + batch]
        missing = ((0, batch - len(tokens)), (0, 0))
        nats += float(loss(params, np.pad(tokens, missing), np.pad(is_target, missing)))
    return nats / math.log(2) / windows.num_bytes
