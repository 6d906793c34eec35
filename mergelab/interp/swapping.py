"""Which layers carry the change between two fine-tunes: parts of one put into the other, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import batches, check_prompts
from mergelab.errors import SiteError
from mergelab.interp.metrics import Metric
from mergelab.interp.patching import rows_of
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import require_decoder
from mergelab.models.table import Leaf, get_leaf, tree_from_leaves

__all__ = ["LayerSwaps", "swap_layers"]

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
    metric: Metric | None = None,
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
        metric: scores the logits, see `mergelab.interp.metrics`. By default `-KL(second || mixture)`, the
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
    metric: Metric | None,
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
        kl = (jnp.exp(wanted) * (wanted - jax.nn.log_softmax(found))).sum(axis=-1)
        weight = mask.astype(jnp.float32)
        return -(kl * weight).sum(axis=1) / weight.sum(axis=1)

    return jax.lax.map(one, mixtures)
