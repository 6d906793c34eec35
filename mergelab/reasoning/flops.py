"""Floating-point operations of a model's passes, as the lowered programs state them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mergelab.activations.batches import bucket_size
from mergelab.models.model import Model, Params

__all__ = ["PassCosts", "pass_costs"]


@dataclass(frozen=True)
class PassCosts:
    """Operations of reading a prompt, and of one more token of one row.

    Attributes:
        prompt: operations of the pass over a prompt of the length asked for.
        token: operations of one step of one row.
    """

    prompt: float
    token: float

    def of(self, generated: int, prompts: int = 1) -> float:
        """Operations of prompts and the tokens generated behind them."""
        return prompts * self.prompt + generated * self.token


def pass_costs(
    model: Model, params: Params, prompt: int, new: int, *, rows: int = 1, compiled: bool = False
) -> PassCosts:
    """Operations of the programs that read a prompt and generate behind it.

    What XLA states of the programs for these shapes, padding to buckets and unused slots of the cache
    included. Readings and edits are not counted.

    Args:
        model: a decoder.
        params: its parameters, or their shapes.
        prompt: number of tokens of the prompt.
        new: most new tokens.
        rows: number of rows that are stepped side by side.
        compiled: whether the programs are compiled first; else they are only lowered, which counts what the
            compiler might still remove.
    """
    length, capacity = bucket_size(prompt), bucket_size(new)
    dtype = params["embed"]["embedding"].dtype

    def read(params: Params, tokens: Any) -> Any:
        cache = model.new_cache(1, length - 1 + capacity, dtype)
        return model.apply(params, tokens, cache=cache, logits=False).cache

    def step(params: Params, tokens: Any) -> Any:
        cache = model.new_cache(rows, length - 1 + capacity, dtype)
        return model.apply(params, tokens, cache=cache).logits

    def cost(program: Any, *shape: int) -> float:
        lowered = jax.jit(program).lower(params, jax.ShapeDtypeStruct(shape, jnp.int32))
        found = (lowered.compile() if compiled else lowered).cost_analysis()
        found = found[0] if isinstance(found, list) else found or {}
        return float(found.get("flops", 0.0))

    return PassCosts(cost(read, 1, max(length - 1, 1)), cost(step, rows, 1) / rows)
