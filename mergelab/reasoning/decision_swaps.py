"""Blocks of one model put into another, one by one and cumulatively, and what becomes of chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from mergelab.activations.batches import batches
from mergelab.activations.losses import UNEMBEDDED
from mergelab.models.decoder import ENTRANCE_PARTS
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import added_sites, logits_of
from mergelab.models.table import get_leaf, tree_from_leaves
from mergelab.reasoning.decision_pair import DecisionPair, last_log_probs, stacked

__all__ = ["SwapTable", "swap_activations", "swap_weights"]

By = Literal["weights", "activations"]


@dataclass(frozen=True)
class SwapTable:
    """Log-probabilities of the chosen tokens in mixtures of two models, means over contexts, in nats.

    Attributes:
        by: what was swapped.
        parts: names of what was swapped: `embed`, `blocks.0`, ..., `end` (the last norm and the unembedding).
        first: float32 `[tokens]`, of the first model.
        second: float32 `[tokens]`, of the second.
        single: float32 `[parts, tokens]`, of the first model with that part of the second.
        cumulative: float32 `[parts, tokens]`, with that part and all before it.
        random: control, `[parts, tokens]`: as `single`, with changes of the same length in random directions.
        fewest: float32 `[tokens, k]`, of the first model with the 1, 2, ... parts of the second that change a
            token's log-probability most in its direction by themselves.
    """

    by: By
    parts: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    single: np.ndarray
    cumulative: np.ndarray
    random: np.ndarray
    fewest: np.ndarray

    def order(self, token: int) -> list[int]:
        """The parts by how far each by itself takes a token from the first model towards the second."""
        return _order(self.single, self.first, self.second)[:, token].tolist()

    def enough(self, token: int, share: float = 0.5) -> int | None:
        """How many of these parts are enough for a share of the change; None if those tried are not."""
        change = self.second[token] - self.first[token]
        reached = (self.fewest[token] - self.first[token]) * np.sign(change) >= share * abs(change)
        return int(np.argmax(reached)) + 1 if reached.any() else None


def swap_weights(
    pair: DecisionPair, contexts: Sequence[Sequence[int]], *, fewest: int = 4, batch: int = 8, seed: int = 0
) -> SwapTable:
    """Puts the weights of each block of the second model into the first.

    Memory is that of four models: the two, a mixture, and the first with random changes.

    Args:
        pair: two models of one shape.
        contexts: token ids of each context.
        fewest: how many of the strongest parts are tried together.
        batch: contexts in one pass.
        seed: seed of the random changes, which for each parameter are those of the second model, shuffled.
    """
    model, first = pair.first
    parts = ("embed", *(f"blocks.{i}" for i in range(model.config.n_layers)), "end")
    noisy = _with_shuffled_changes(model, first, pair.second[1], jax.random.key(seed))
    tokens, mask = stacked(contexts)

    def run(mixtures: np.ndarray, other: Params) -> np.ndarray:
        # One mixture a call: the parameters of several would be in memory at once.
        ids, rows = jnp.asarray(pair.ids), [*batches(len(tokens), batch)]
        total = np.zeros((len(mixtures), len(pair.ids)))
        for number, chosen in enumerate(mixtures):
            mixed = _mixed(model, first, other, jnp.asarray(chosen))
            for places, count in rows:
                found = last_log_probs(model, mixed, tokens[places], mask[places])[:, ids]
                total[number] += np.asarray(found)[:count].sum(axis=0)
        return (total / len(tokens)).astype(np.float32)

    return _table("weights", parts, run, pair.second[1], noisy, len(pair.ids), fewest)


def swap_activations(
    pair: DecisionPair, contexts: Sequence[Sequence[int]], *, fewest: int = 4, batch: int = 8, seed: int = 0
) -> SwapTable:
    """Puts what each block of the second model adds to the last token's stream into the first model.

    A block's addition is what its attention and its MLP write; the cumulative swap of all blocks up to one
    gives the first model the second's stream there, at the last token alone. The part `end` is the last
    norm's output.

    Args:
        pair: two models of one shape.
        contexts: token ids of each context.
        fewest: how many of the strongest parts are tried together.
        batch: contexts in one pass.
        seed: seed of the random changes, each as long as the change it stands for.
    """
    model, params = pair.first
    parts = ("embed", *(f"blocks.{i}" for i in range(model.config.n_layers)), "end")
    tokens, mask = stacked(contexts)
    seen = []
    for rows, count in batches(len(tokens), batch):
        both = [_additions(*one, tokens[rows], mask[rows]) for one in pair.models]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), int(rows[0])), len(both[0]))
        noise = {
            site: both[0][site] + _as_long(both[1][site] - both[0][site], key)
            for site, key in zip(both[0], keys, strict=True)
        }
        seen.append((tokens[rows], mask[rows], count, both[1], noise))

    def run(mixtures: np.ndarray, random: bool) -> np.ndarray:
        total = np.zeros((len(mixtures), len(pair.ids)))
        for ids, real, count, other, noise in seen:
            put = noise if random else other
            found = _patched(model, params, ids, real, put, jnp.asarray(mixtures), jnp.asarray(pair.ids))
            total += np.asarray(found)[:, :count].sum(axis=1)
        return (total / len(tokens)).astype(np.float32)

    return _table("activations", parts, run, False, True, len(pair.ids), fewest)


def _table(
    by: By, parts: tuple[str, ...], run: Any, other: Any, noise: Any, tokens: int, fewest: int
) -> SwapTable:
    """Runs the mixtures; `run` takes them, bool `[mixtures, parts]`, and what is mixed in."""
    count = len(parts)
    one, up_to = np.eye(count, dtype=bool), np.tri(count, dtype=bool)
    found = run(np.concatenate([np.zeros((1, count), bool), one, up_to]), other)
    first, single, cumulative = found[0], found[1 : count + 1], found[count + 1 :]
    order = _order(single, first, cumulative[-1])
    most = min(fewest, count)
    best = [one[order[: k + 1, token]].any(axis=0) for token in range(tokens) for k in range(most)]
    together = run(np.array(best).reshape(-1, count), other).reshape(tokens, most, tokens)
    reached = together[np.arange(tokens), :, np.arange(tokens)]
    return SwapTable(by, parts, first, cumulative[-1], single, cumulative, run(one, noise), reached)


def _order(single: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    towards = (single - first[None]) * np.sign(second - first)[None]
    return np.argsort(-towards, axis=0, kind="stable")


def _part(path: tuple[str, ...], layers: int) -> int:
    if path[0].startswith("blocks_"):
        return 1 + int(path[0].removeprefix("blocks_"))
    return 0 if path[0] in ENTRANCE_PARTS else layers + 1


@partial(jax.jit, static_argnames="model")
def _mixed(model: Model, first: Params, second: Params, chosen: Array) -> Params:
    layers = model.config.n_layers
    return tree_from_leaves(
        {
            leaf: jnp.where(chosen[_part(leaf.path, layers)], get_leaf(second, leaf), get_leaf(first, leaf))
            for leaf in model.table()
        }
    )


def _with_shuffled_changes(model: Model, first: Params, second: Params, key: Array) -> Params:
    """The first model plus, for each parameter, the elements of its change with other signs and order."""
    return tree_from_leaves(
        {
            leaf: _with_shuffled_change(
                get_leaf(first, leaf), get_leaf(second, leaf), jax.random.fold_in(key, number)
            )
            for number, leaf in enumerate(model.table())
        }
    )


@jax.jit  # one program for each shape: one for all parameters took minutes to compile
def _with_shuffled_change(one: Array, other: Array, key: Array) -> Array:
    change = (other.astype(jnp.float32) - one.astype(jnp.float32)).reshape(-1)
    order, sign = jax.random.split(key)
    # A turn by a random number of places, which costs less than a permutation, and random signs.
    moved = jnp.roll(change, jax.random.randint(order, (), 0, max(change.size, 1)))
    moved = moved * jax.random.rademacher(sign, moved.shape, jnp.float32)
    return (one.astype(jnp.float32) + moved.reshape(one.shape)).astype(one.dtype)


def _sites(model: Model) -> list[tuple[str, ...]]:
    """The sites of each part."""
    blocks = [added_sites(model, i) for i in range(model.config.n_layers)]
    return [("embed",), *blocks, (UNEMBEDDED,)]


@partial(jax.jit, static_argnames="model")
def _additions(model: Model, params: Params, tokens: Array, mask: Array) -> dict[str, Array]:
    """What the sites of all parts hold at the last token, `[batch, width]`."""
    names = [site for sites in _sites(model) for site in sites]
    seen = model.apply(params, tokens, mask=mask, capture=names, logits=False).captured
    return {name: seen[name][:, -1] for name in names}


def _as_long(change: Array, key: Array) -> Array:
    """Random vectors of the same lengths."""
    drawn = jax.random.normal(key, change.shape, jnp.float32)
    length = jnp.linalg.norm(change.astype(jnp.float32), axis=-1, keepdims=True)
    return (drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True) * length).astype(change.dtype)


@partial(jax.jit, static_argnames="model")
def _patched(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    values: dict[str, Array],
    mixtures: Array,
    ids: Array,
) -> Array:
    """Log-probabilities of the chosen tokens, `[mixtures, batch, tokens]`; earlier tokens are read once."""
    batch, length = tokens.shape
    cache = model.new_cache(batch, length, params["embed"]["embedding"].dtype)
    read = model.apply(params, tokens[:, :-1], mask=mask[:, :-1], cache=cache, logits=False).cache

    def one(chosen: Array) -> Array:
        edits = {
            site: Partial(_put_last, values[site], chosen[number])
            for number, sites in enumerate(_sites(model))
            for site in sites
        }
        out = model.apply(params, tokens[:, -1:], cache=read, edit=edits, capture=UNEMBEDDED, logits=False)
        last = jnp.asarray(out.captured[UNEMBEDDED])[:, -1]
        return jax.nn.log_softmax(logits_of(model, params, last), axis=-1)[:, ids]

    return jax.lax.map(one, mixtures)


def _put_last(value: Array, chosen: Array, x: Array) -> Array:
    return x.at[:, -1].set(jnp.where(chosen, value.astype(x.dtype), x[:, -1]))
