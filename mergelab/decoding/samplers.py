"""Samplers: transforms of the logits followed by a choice, the likeliest token or a random one.

>>> from mergelab.decoding import MinPFilter, RepetitionPenalty, Temperature, greedy, sample
>>> precise = greedy(RepetitionPenalty(1.1))
>>> creative = sample(Temperature(0.8), MinPFilter(0.05))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from mergelab.decoding.transforms import (
    Chain,
    History,
    LogitsTransform,
    MinNewTokens,
    MinPFilter,
    RepetitionPenalty,
    Temperature,
    TopKFilter,
    TopPFilter,
    chain,
    logit_bias,
    require,
    suppress,
    transform,
)
from mergelab.errors import DecodingError

__all__ = ["Sampler", "TokenChoice", "greedy", "row_keys", "sample", "sampler_from_options"]


class TokenChoice(Protocol):
    """What chooses each row's next token: a `Sampler`, or a pytree that is called as one."""

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History, keys: Key[Array, " batch"]
    ) -> Int[Array, " batch"]: ...


@transform
class Sampler:
    """Chooses each row's next token.

    Attributes:
        transforms: applied to the float32 logits first.
        random: draw from the distribution, or take its likeliest token; static.
    """

    transforms: Chain
    random: bool = field(metadata={"static": True})

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History, keys: Key[Array, " batch"]
    ) -> Int[Array, " batch"]:
        """The chosen tokens, int32; row `i` is a function of row `i` of the inputs alone."""
        logits = self.transforms(logits.astype(jnp.float32), history)
        if self.random:
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def greedy(*transforms: LogitsTransform) -> Sampler:
    """The likeliest token after `transforms`; of equal ones the lowest id."""
    return Sampler(chain(*transforms), random=False)


def sample(*transforms: LogitsTransform) -> Sampler:
    """A draw from the distribution after `transforms`."""
    return Sampler(chain(*transforms), random=True)


def row_keys(key: Key[Array, "*batch"] | int, batch: int) -> Key[Array, " batch"]:
    """One key per row: `key` itself where it has one per row, else `fold_in(key, row)`.

    Give a key per row to make a row's draws independent of its place in a batch too.

    Args:
        key: a typed key (`jax.random.key`), one for each row, or a seed.
        batch: the number of rows.

    Raises:
        DecodingError: the key is neither.
    """
    if isinstance(key, int) and not -(2**63) <= key < 2**63:
        raise DecodingError("the seed is beyond 64 bits; give a smaller one.")
    key = jax.random.key(key) if isinstance(key, int) else key
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    shapes = f"a seed, jax.random.key(seed), or {batch} such keys, one per row"
    require("key", key, typed and key.shape in ((), (batch,)), shapes)
    if key.ndim:
        return key
    return _folded(key, batch)


@partial(jax.jit, static_argnames="batch")
def _folded(key: Key[Array, ""], batch: int) -> Key[Array, " batch"]:
    """A key folded with the number of each row, as one program."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))


def sampler_from_options(
    *,
    temperature: ArrayLike | None = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    repetition_penalty: ArrayLike | None = None,
    bias: Mapping[int, float] | None = None,
    suppressed: Iterable[int] = (),
    min_new_tokens: int = 0,
    end_ids: Iterable[int] = (),
) -> Sampler:
    """The sampler that usual generation options ask for, in the order `transformers` applies them.

    Args:
        temperature: None or 0 takes the likeliest token; truncations then change nothing and are left out.
        top_k: see `TopKFilter`; None and 0 keep everything.
        top_p: see `TopPFilter`.
        min_p: see `MinPFilter`.
        repetition_penalty: see `RepetitionPenalty`.
        bias: see `logit_bias`.
        suppressed: see `suppress`.
        min_new_tokens: no token of `end_ids` before this many tokens.
        end_ids: the tokens that end a text.

    Raises:
        DecodingError: an option is out of its range.
    """
    steps: list[LogitsTransform] = []
    if bias:
        steps.append(logit_bias(bias))
    if repetition_penalty is not None:
        steps.append(RepetitionPenalty(repetition_penalty))
    if min_new_tokens:
        steps.append(MinNewTokens(min_new_tokens, suppress(end_ids).ids))
    if suppressed := tuple(suppressed):
        steps.append(suppress(suppressed))
    if temperature is None or (isinstance(temperature, int | float) and temperature == 0):
        return greedy(*steps)
    steps.append(Temperature(temperature))
    if top_k:
        steps.append(TopKFilter(top_k))
    if top_p is not None:
        steps.append(TopPFilter(top_p))
    if min_p is not None:
        steps.append(MinPFilter(min_p))
    return sample(*steps)
