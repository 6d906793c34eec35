"""What two models say next after the same prompts: the tokens they share, gain and lose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import batches, check_prompts
from mergelab.errors import SiteError
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder

__all__ = ["NextTokens", "compare_next_tokens"]


@dataclass(frozen=True)
class NextTokens:
    """The k likeliest next tokens of two models after each prompt, the likeliest first.

    Attributes:
        first: int32 `[prompts, k]`, of the first model.
        second: the same of the second.
        first_log_probabilities: float32 `[prompts, k]`, natural logarithms, under the model they are of.
        second_log_probabilities: the same of the second.
        kl: float32 `[prompts]`: `KL(first || second)` of the whole distributions, in nats.
    """

    first: np.ndarray
    second: np.ndarray
    first_log_probabilities: np.ndarray
    second_log_probabilities: np.ndarray
    kl: np.ndarray

    @property
    def overlap(self) -> np.ndarray:
        """`[prompts]`: tokens in both sets over tokens in either (Jaccard's index)."""
        both = (self.first[:, :, None] == self.second[:, None]).sum(axis=(1, 2))
        return both / (2 * self.first.shape[1] - both)

    @property
    def agreement(self) -> float:
        """The part of the prompts after which both put the same token first."""
        return float((self.first[:, 0] == self.second[:, 0]).mean())

    def gained(self, prompt: int) -> list[int]:
        """Tokens among the second model's k and not among the first's."""
        return [token for token in self.second[prompt].tolist() if token not in self.first[prompt]]

    def lost(self, prompt: int) -> list[int]:
        """Tokens among the first model's k and not among the second's."""
        return [token for token in self.first[prompt].tolist() if token not in self.second[prompt]]


def compare_next_tokens(
    first: tuple[Model, Params],
    second: tuple[Model, Params],
    tokens: Any,
    *,
    mask: Any = None,
    k: int = 10,
    batch: int = 16,
) -> NextTokens:
    """Compares two decoders with one vocabulary after the last real token of each prompt.

    Args:
        first: a model and its parameters, on any mesh.
        second: another, of any family.
        tokens: `[prompts, length]`.
        mask: True for real tokens.
        k: the size of the sets.
        batch: prompts in one pass.

    Raises:
        SiteError: a model is an encoder, the vocabularies differ in size, or k exceeds it.
    """
    sizes = []
    for model, _ in (first, second):
        require_decoder(model)
        sizes.append(model.config.vocab_size)
    if sizes[0] != sizes[1] or not 1 <= k <= sizes[0]:
        raise SiteError(
            f"sets of {k} next tokens cannot be compared over vocabularies of {sizes[0]} and {sizes[1]}; "
            "give models with one vocabulary, and a k within it."
        )
    tokens, real = check_prompts(model, tokens, mask)
    parts: list[tuple[np.ndarray, ...]] = []
    for rows, count in batches(len(tokens), batch):
        found = _compare((first[0], second[0]), (first[1], second[1]), tokens[rows], real[rows], k)
        parts.append(tuple(np.asarray(value)[:count] for value in found))
    return NextTokens(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@partial(jax.jit, static_argnames=("models", "k"))
def _compare(
    models: tuple[Model, Model], params: tuple[Params, Params], tokens: Array, mask: Array, k: int
) -> tuple[Array, ...]:
    places = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)

    def after(model: Model, params: Params) -> Array:
        out = model.apply(params, tokens, mask=mask).logits
        assert out is not None
        return jax.nn.log_softmax(out[jnp.arange(len(tokens)), places])

    one, other = (after(model, p) for model, p in zip(models, params, strict=True))
    (values, ids), (other_values, other_ids) = jax.lax.top_k(one, k), jax.lax.top_k(other, k)
    return ids, other_ids, values, other_values, (jnp.exp(one) * (one - other)).sum(axis=-1)
