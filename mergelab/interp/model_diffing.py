"""Two models compared: their activations on the same text, and parts of one put into the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import batches
from mergelab.activations.capture import check_prompts
from mergelab.activations.losses import kl_of_log_probabilities
from mergelab.errors import SiteError
from mergelab.interp.logit_metrics import LogitMetric
from mergelab.interp.patching import rows_of
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.table import Leaf, get_leaf, tree_from_leaves

__all__ = ["LayerSwaps", "NextTokens", "compare_next_tokens", "swap_layers"]


By = Literal["block", "component"]


@dataclass(frozen=True)
class LayerSwaps:
    """A metric of two models and of mixtures of them.

    Attributes:
        parts: names: `embed`, `blocks_0` (or `blocks_0.attn`, `blocks_0.mlp`), ..., `final_norm`, ...
        first: float32 `[prompts]`, of the first model.
        second: float32 `[prompts]`, of the second.
        alone: float32 `[prompts, parts]`: of the first model with that part of the second.
        without: float32 `[prompts, parts]`: of the second model with that part of the first.
    """

    parts: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    alone: np.ndarray
    without: np.ndarray

    @property
    def enough(self) -> np.ndarray:
        """`[parts]`: how much of the change a part brings by itself; 1 is all of it, means over prompts."""
        return (self.alone.mean(axis=0) - self.first.mean()) / self._change

    @property
    def needed(self) -> np.ndarray:
        """`[parts]`: how much of the change is lost without a part; 1 is all of it, means over prompts."""
        return (self.second.mean() - self.without.mean(axis=0)) / self._change

    @property
    def _change(self) -> float:
        return float(self.second.mean() - self.first.mean())


def swap_layers(
    model: Model,
    first: Params,
    second: Params,
    tokens: Any,
    *,
    metric: LogitMetric | None = None,
    by: By = "block",
    mask: Any = None,
    batch: int = 16,
) -> LayerSwaps:
    """Puts every part of one fine-tune into the other, in both directions.

    Args:
        model: what both are parameters of, a decoder.
        first: parameters, on any mesh.
        second: others, of the same shapes and dtypes.
        tokens: `[prompts, length]`.
        metric: scores the logits, as those of `mergelab.interp` do. By default `-KL(second || mixture)`, the
            mean over a prompt's tokens, in nats: 0 for the second model.
        by: `block` swaps blocks, `component` their attention and MLP apart, each with its norm.
        mask: True for real tokens.
        batch: prompts in one pass. Mixtures are made one after the other: memory is that of three models.

    Returns:
        Two numbers for each part and prompt, from one compiled program.

    Raises:
        SiteError: the model is an encoder, or the parameters differ in shape or dtype.
    """
    require_decoder(model)
    tokens, real = check_prompts(model, tokens, mask)
    for leaf in model.table():
        one, other = get_leaf(first, leaf), get_leaf(second, leaf)
        if one.shape != other.shape or one.dtype != other.dtype:
            raise SiteError(
                f"{leaf.name} is {one.dtype} {list(one.shape)} in the first model and {other.dtype} "
                f"{list(other.shape)} in the second; give two fine-tunes of one model in one dtype."
            )
    parts = tuple(dict.fromkeys(_part(leaf, by) for leaf in model.table()))
    only = np.eye(len(parts), dtype=bool)
    mixtures = np.concatenate([only, ~only, np.zeros((1, len(parts)), bool), np.ones((1, len(parts)), bool)])
    found: list[np.ndarray] = []
    for rows, count in batches(len(tokens), batch):
        scored = None if metric is None else rows_of(metric, rows, len(tokens))
        values = _swap(model, first, second, tokens[rows], real[rows], scored, mixtures, by)
        found.append(np.asarray(values).T[:count])
    table = np.concatenate(found)
    alone, without = table[:, : len(parts)], table[:, len(parts) : -2]
    return LayerSwaps(parts, table[:, -2], table[:, -1], alone, without)


def _part(leaf: Leaf, by: By) -> str:
    if not leaf.path[0].startswith("blocks_") or by == "block":
        return leaf.path[0]
    return f"{leaf.path[0]}.{leaf.path[1].removesuffix('_norm')}"


@partial(jax.jit, static_argnames=("model", "by"))
def _swap(
    model: Model,
    first: Params,
    second: Params,
    tokens: Array,
    mask: Array,
    metric: LogitMetric | None,
    mixtures: Array,
    by: By,
) -> Array:
    """`[mixtures, batch]`; `mixtures [mixtures, parts]` is True for parts of the second model."""
    numbers = {part: i for i, part in enumerate(dict.fromkeys(_part(leaf, by) for leaf in model.table()))}

    def logits(params: Params) -> Array:
        out = model.apply(params, tokens, mask=mask).logits
        assert out is not None
        return out

    wanted = jax.nn.log_softmax(logits(second)) if metric is None else None

    def one(chosen: Array) -> Array:
        mixed = {
            leaf: jnp.where(chosen[numbers[_part(leaf, by)]], get_leaf(second, leaf), get_leaf(first, leaf))
            for leaf in model.table()
        }
        found = logits(tree_from_leaves(mixed))
        if metric is not None:
            return metric(found)
        assert wanted is not None
        kl = kl_of_log_probabilities(wanted, jax.nn.log_softmax(found))
        weight = mask.astype(jnp.float32)
        return -(kl * weight).sum(axis=1) / weight.sum(axis=1)

    return jax.lax.map(one, mixtures)


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
    return ids, other_ids, values, other_values, kl_of_log_probabilities(one, other)
