"""What a reconstruction costs an encoder: how its text embeddings change with the SAE spliced in.

An encoder predicts no next tokens, so what is downstream of a site is the vector it makes of a whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.model_activations import ModelActivations
from mergelab.activations.sentences import Pooling, pool
from mergelab.errors import SAEError
from mergelab.models.model import Model
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.sae import SAE
from mergelab.sae.splice import (
    hold_at,
    kept_in_pass,
    limits_of,
    mean_activation,
    place_batches,
    splice_from,
    token_batches,
)
from mergelab.sae.subject_model import check_target

__all__ = ["EmbeddingChange", "evaluate_embeddings", "rank_agreement"]

_COMPARED = 1024  # contexts whose similarities are compared: half a million pairs


@dataclass(frozen=True)
class EmbeddingChange:
    """Embeddings of an encoder with its site replaced, against its own.

    Attributes:
        contexts: texts embedded.
        cosine: mean cosine of a text's embedding as it is and with the site replaced by its reconstruction.
        cosine_mean: the same with the site replaced by its mean over the text, which makes all texts one.
        rank: Spearman's correlation, over pairs of texts, of their similarity as it is and spliced.
        nearest: fraction of the texts whose nearest other text stays the same.
    """

    contexts: int
    cosine: float
    cosine_mean: float
    rank: float
    nearest: float

    @property
    def recovered(self) -> float:
        """`(cosine - cosine_mean) / (1 - cosine_mean)`: 1 is lossless, 0 as bad as mean ablation."""
        gap = 1 - self.cosine_mean
        return (self.cosine - self.cosine_mean) / gap if gap else float("nan")


def evaluate_embeddings(
    sae: SAE,
    source: ModelActivations,
    *,
    contexts: int | None = None,
    pooling: Pooling = "mean",
) -> EmbeddingChange:
    """Embeds every context as it is, spliced, and with the site at its mean.

    Args:
        sae: SAE that reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        source: an encoder and a text, whose contexts are the texts that are embedded.
        contexts: number of contexts to use; all by default. Similarities are of the first 1024.
        pooling: how the last states of a text become its embedding.

    Raises:
        SAEError: the SAE does not fit the site, the model is not an encoder, or there are fewer than three
            contexts.
    """
    target = check_target(sae, source)
    tokens = source.tokens[:contexts]
    if source.model.predicts:
        raise SAEError(
            f"a {source.model.family.model_type!r} model makes no embeddings of texts, but predicts next "
            "tokens; ask for the metric 'downstream'."
        )
    if len(tokens) < 3:
        raise SAEError(f"similarities of {len(tokens)} contexts have no order; give text for three or more.")
    mean = jnp.asarray(mean_activation(source, contexts, target), jnp.float32)
    limits = limits_of(source)
    found = [
        np.asarray(
            _embeddings(
                source.params,
                sae,
                mean,
                limits,
                batch,
                by_place,
                model=source.model,
                sites=(source.sites[0], target),
                deciding=source.sites,
                pooling=pooling,
            )
        )[:, :real]
        for (batch, real), by_place in zip(
            token_batches(tokens, source.batch), place_batches(source, contexts), strict=True
        )
    ]
    plain, spliced, flat = np.concatenate(found, axis=1).astype(np.float64)
    near, near_spliced = (_similarities(part[:_COMPARED]) for part in (plain, spliced))
    return EmbeddingChange(
        contexts=len(tokens),
        cosine=float((plain * spliced).sum(axis=1).mean()),
        cosine_mean=float((plain * flat).sum(axis=1).mean()),
        rank=rank_agreement(plain[:_COMPARED], spliced[:_COMPARED]),
        nearest=float((near.argmax(axis=1) == near_spliced.argmax(axis=1)).mean()),
    )


@partial(jax.jit, static_argnames=("model", "sites", "deciding", "pooling"))
def _embeddings(
    params: Any,
    sae: SAE,
    mean: Array,
    limits: Array,
    tokens: Array,
    by_place: Array,
    *,
    model: Model,
    sites: tuple[str, str],
    deciding: tuple[str, ...],
    pooling: Pooling,
) -> Array:
    """Unit embeddings `[3, batch, width]`: as it is, spliced, at the mean; `sites` are read and written.

    The norms of the sites `deciding` tell which tokens count; the others stay as they are.
    """
    read, site = sites

    def embed(edit: Any) -> tuple[Array, Any]:
        out = model.apply(params, tokens, edit=edit, capture=list(dict.fromkeys((read, *deciding))))
        assert out.hidden is not None
        vectors = pool(out.hidden.astype(jnp.float32), jnp.ones(tokens.shape, bool), pooling)
        norms = jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors / norms, out.captured

    plain, captured = embed(None)
    kept = kept_in_pass(captured, deciding, limits, by_place)
    spliced = embed({site: splice_from(sae, captured[read], kept)})[0]
    return jnp.stack([plain, spliced, embed({site: hold_at(kept, mean)})[0]])


def rank_agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation of the cosines of all pairs of texts, in two embeddings of the same texts.

    Args:
        one: `[texts, width]`, of length 1.
        other: the same texts, `[texts, width]`, of length 1.

    Returns:
        Correlation from -1 to 1; NaN where all cosines of a set are equal.
    """
    pairs = np.triu_indices(len(one), 1)
    a, b = (_ranks(_similarities(part)[pairs]) for part in (one, other))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def _similarities(embeddings: np.ndarray) -> np.ndarray:
    """Cosines of all pairs, `[texts, texts]`; a text is not its own neighbor."""
    found = embeddings @ embeddings.T
    np.fill_diagonal(found, -np.inf)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    found = evaluate_embeddings(sae, evidence.judge)
    against = f"embeddings of {found.contexts} contexts, mean of their last states"
    yield "cosine", found.cosine, f"{against}; 1 is lossless"
    yield "recovered", found.recovered, "of the cosine; 1 lossless, 0 as bad as mean ablation"
    yield "rank", found.rank, "Spearman over pairs of contexts, of their similarity; 1 is lossless"
    yield "nearest", found.nearest, "fraction of the contexts that keep their nearest; 1 is lossless"


METRIC = Metric(
    name="embeddings",
    about="change of an encoder's text embeddings",
    units={"cosine": "", "recovered": "", "rank": "", "nearest": ""},
    measure=_scores,
    needs=("encoder",),
)
