"""Logits of chosen tokens over layers and positions in two models, and what their difference is a sum of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.batches import batches
from mergelab.interp.attribution import direct_logit_attribution
from mergelab.models.model import Model, Params
from mergelab.models.residual_stream import readout
from mergelab.reasoning.decision_pair import DecisionPair, LoadedModel, stacked

__all__ = ["DifferenceParts", "LayerLogits", "attribute_difference", "read_layers"]


@dataclass(frozen=True)
class LayerLogits:
    """The logit lens on chosen tokens.

    Attributes:
        sites: streams that were read, in forward order.
        logits: float32 `[prompts, sites, positions, tokens]`, of the last positions.
        log_probs: the same as log-probabilities, in nats.
        ranks: int32 `[prompts, sites, positions, tokens]`, how many tokens have a larger logit.
    """

    sites: tuple[str, ...]
    logits: np.ndarray
    log_probs: np.ndarray
    ranks: np.ndarray


def read_layers(
    loaded: LoadedModel,
    contexts: Sequence[Sequence[int]],
    ids: np.ndarray,
    *,
    positions: int = 8,
    batch: int = 8,
) -> LayerLogits:
    """Reads the streams behind the embeddings and every block as if each were the last.

    Args:
        loaded: a decoder and its parameters.
        contexts: token ids of each context.
        ids: chosen tokens, int `[tokens]`.
        positions: how many of the last positions are read; those beyond a context's beginning have no
            meaning.
        batch: contexts in one pass.
    """
    model, params = loaded
    sites = ("embed", *(f"blocks.{i}.resid_post" for i in range(model.config.n_layers)))
    tokens, mask = stacked(contexts)
    positions = min(positions, min(map(len, contexts)))
    found = []
    for rows, count in batches(len(tokens), batch):
        read = _read(model, params, tokens[rows], mask[rows], jnp.asarray(ids, jnp.int32), sites, positions)
        found.append([np.asarray(part)[:, :count].swapaxes(0, 1) for part in read])
    logits, log_probs, ranks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return LayerLogits(sites, logits, log_probs, ranks)


@partial(jax.jit, static_argnames=("model", "sites", "positions"))
def _read(
    model: Model,
    params: Params,
    tokens: Array,
    mask: Array,
    ids: Array,
    sites: tuple[str, ...],
    positions: int,
) -> tuple[Array, Array, Array]:
    """`[sites, batch, positions, tokens]` each; the logits of one site are held at a time."""
    seen = model.apply(params, tokens, mask=mask, capture=sites, logits=False).captured
    streams = jnp.stack([seen[name][:, -positions:] for name in sites])

    def one(stream: Array) -> tuple[Array, Array, Array]:
        logits = readout(model, params, stream)
        chosen = logits[..., ids]
        above = jax.lax.map(lambda n: (logits > chosen[..., n, None]).sum(axis=-1), jnp.arange(len(ids)))
        normal = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return chosen, chosen - normal, jnp.moveaxis(above, 0, -1).astype(jnp.int32)

    return jax.lax.map(one, streams)


@dataclass(frozen=True)
class DifferenceParts:
    """The difference of two models' logits at the last token, as a sum.

    Attributes:
        names: what each part comes from: `embed`, `blocks.0.attn.out`, `blocks.0.mlp.out`, ...; parts that
            one model alone has are 0 in the other.
        parts: float32 `[models, prompts, parts, tokens]`.
        logits: float32 `[models, prompts, tokens]`, before a soft cap.
    """

    names: tuple[str, ...]
    parts: np.ndarray
    logits: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """`[prompts, parts, tokens]`, second less first: they sum to the difference of the logits."""
        return self.parts[1] - self.parts[0]


def attribute_difference(
    pair: DecisionPair, contexts: Sequence[Sequence[int]], *, batch: int = 8
) -> DifferenceParts:
    """Direct logit attribution of the chosen tokens in both models, at the last token of each context."""
    tokens, mask = stacked(contexts)
    found = []
    for model, params in pair.models:
        each = [
            direct_logit_attribution(
                model, params, tokens, np.full(len(tokens), token, np.int32), mask=mask, batch=batch
            )
            for token in pair.ids.tolist()
        ]
        parts = np.stack([one.parts[:, :, -1] for one in each], axis=-1)
        found.append((each[0].names, parts, np.stack([one.logits[:, -1] for one in each], axis=-1)))
    names = tuple(dict.fromkeys([*found[0][0], *found[1][0]]))
    parts = np.zeros((2, len(tokens), len(names), len(pair.ids)), np.float32)
    for number, (own, values, _) in enumerate(found):
        parts[number][:, [names.index(name) for name in own]] = values
    return DifferenceParts(names, parts, np.stack([logits for _, _, logits in found]))
