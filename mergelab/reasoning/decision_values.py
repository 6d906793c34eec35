"""MLP value vectors that promote chosen tokens in given contexts, in two models, beside random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import batches
from mergelab.errors import SiteError
from mergelab.interp.value_vectors import tokens_of_values
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import norm_gain, unembedding
from mergelab.reasoning.decision_pair import DecisionPair, LoadedModel, stacked

__all__ = ["Promoter", "ValueTable", "find_promoters", "value_contributions"]


@dataclass(frozen=True)
class Promoter:
    """A neuron, and what its value vector adds to a token's logit.

    Attributes:
        token: text of the token.
        layer, neuron: where it stands.
        contributions: mean over contexts of what it adds in both models; None where a model has no such
            neuron.
        tokens: what its value vector points to, in the model where it adds more.
    """

    token: str
    layer: int
    neuron: int
    contributions: tuple[float | None, float | None]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class ValueTable:
    """Neurons that promote the chosen tokens.

    Attributes:
        promoters: those with the largest difference of the two models, or, of models of different shapes, the
            largest contribution in either, the largest first for each token.
        random: control, by token: what the strongest neuron adds, by the same measure, along a random
            direction of the same length; the mean over several.
    """

    promoters: tuple[Promoter, ...]
    random: dict[str, float]


def value_contributions(
    loaded: LoadedModel, contexts: Sequence[Sequence[int]], directions: np.ndarray, *, batch: int = 8
) -> np.ndarray:
    """What every neuron adds along directions of the unembedding at the last token, mean over contexts.

    With the factors of the norms frozen; the sum over a block's neurons, and its output bias, is the block's
    `mlp.out` in `direct_logit_attribution`.

    Args:
        loaded: a decoder without experts, and its parameters.
        contexts: token ids of each context.
        directions: float32 `[directions, width]`; columns of the unembedding for tokens.
        batch: contexts in one pass.

    Returns:
        float32 `[layers, neurons, directions]`.

    Raises:
        SiteError: the MLPs are experts, or have different widths.
    """
    model, params = loaded
    posts = [model.sites().get(f"blocks.{i}.mlp.post", ()) for i in range(model.config.n_layers)]
    shapes = {shape[2:] for shape in posts}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise SiteError(
            f"the MLPs of this {model.family.model_type!r} model have neurons of shapes {sorted(shapes)}; "
            "value vectors are compared of plain MLPs of one width."
        )
    tokens, mask = stacked(contexts)
    total = 0.0
    for rows, count in batches(len(tokens), batch):
        weight = np.arange(len(rows)) < count
        found = _contributions(model, params, tokens[rows], mask[rows], weight, jnp.asarray(directions))
        total = total + np.asarray(found)
    return np.asarray(total / len(tokens), np.float32)


@partial(jax.jit, static_argnames="model")
def _contributions(
    model: Model, params: Params, tokens: Array, mask: Array, weight: Array, directions: Array
) -> Array:
    """Sums over the rows that count."""
    layers = range(model.config.n_layers)
    out = model.apply(
        params, tokens, mask=mask, capture=["blocks.*.mlp.post", "final_norm.scale"], logits=False
    )
    factor = out.captured["final_norm.scale"][:, -1, 0].astype(jnp.float32) * weight.astype(jnp.float32)
    read = directions * norm_gain(model, params, "final_norm")[None]
    if model.config.norm.kind == "layer":
        read = read - read.mean(axis=-1, keepdims=True)
    found = []
    for i in layers:
        mlp = params[f"blocks_{i}"]["mlp"]
        values = mlp["down"]["kernel"].astype(jnp.float32)
        post, here, scale = out.captured[f"blocks.{i}.mlp.post"][:, -1].astype(jnp.float32), read, factor
        if "out_norm" in mlp:  # a norm stands between the neurons and the stream
            whole = jnp.matmul(post, values, precision="highest")
            scale = scale * jax.lax.rsqrt(jnp.square(whole).mean(axis=-1) + model.config.norm.eps)
            here = read * norm_gain(model, params, f"blocks_{i}", "mlp", "out_norm")[None]
        along = jnp.matmul(values, here.T, precision="highest")  # [neurons, directions]
        found.append(jnp.einsum("bn,b->n", post, scale, precision="highest")[:, None] * along)
    return jnp.stack(found)


def find_promoters(
    pair: DecisionPair,
    contexts: Sequence[Sequence[int]],
    *,
    most: int = 5,
    draws: int = 8,
    seed: int = 0,
    batch: int = 8,
) -> ValueTable:
    """The neurons that promote each chosen token more in the second model than in the first.

    Args:
        pair: the two models.
        contexts: token ids of each context.
        most: neurons of each token.
        draws: random directions, of each token, that are looked at beside it.
        seed: seed of them.
        batch: contexts in one pass.

    Raises:
        SiteError: a model has experts.
    """
    count, seen = len(pair.ids), []
    for model, params in pair.models:
        wanted = np.asarray(unembedding(model, params)[:, pair.ids].T, np.float32)
        noise = np.random.default_rng(seed).normal(size=(count * draws, wanted.shape[1]))
        length = np.repeat(np.linalg.norm(wanted, axis=1), draws)[:, None]
        drawn = (noise / np.linalg.norm(noise, axis=1, keepdims=True) * length).astype(np.float32)
        directions = np.concatenate([wanted, drawn])
        seen.append(value_contributions((model, params), contexts, directions, batch=batch))
    alike = seen[0].shape == seen[1].shape
    promoters: list[Promoter] = []
    random: dict[str, float] = {}
    for number, text in enumerate(pair.chosen):
        extra = slice(count + number * draws, count + (number + 1) * draws)
        measures = [seen[1] - seen[0]] if alike else seen
        random[text] = float(np.mean([one[..., extra].max(axis=(0, 1)).mean() for one in measures]))
        for which, measure in enumerate(measures):
            best = np.argsort(-measure[..., number], axis=None, kind="stable")[:most]
            for place in best.tolist():
                layer, neuron = divmod(place, measure.shape[1])
                values: list[float | None] = [None, None]
                for n, one in enumerate(seen):
                    if alike or n == which:
                        values[n] = float(one[layer, neuron, number])
                side = which if not alike else int(abs(values[1] or 0) >= abs(values[0] or 0))
                ids, _ = tokens_of_values(*pair.models[side], layer, [neuron], k=5)
                texts = tuple(pair.shown(token) for token in ids[0].tolist())
                promoters.append(Promoter(text, layer, neuron, (values[0], values[1]), texts))
    return ValueTable(tuple(promoters), random)
