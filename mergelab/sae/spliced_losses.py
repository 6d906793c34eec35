"""What a model loses with an SAE's reconstruction, zero or the mean in place of activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.left_out import count_left_out
from mergelab.activations.losses import UNEMBEDDED, token_losses
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.model import Model
from mergelab.models.residual_stream import require_decoder
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

__all__ = ["Downstream", "evaluate_downstream", "predicted_tokens"]


@dataclass(frozen=True)
class Downstream:
    """Losses of one model on one text, in nats per predicted token.

    The site is replaced at the tokens that count by the source's rule; the others stay as they are.

    Attributes:
        tokens: predicted tokens; the first of each context is none, nor is padding.
        ce: cross-entropy of the model as it is.
        ce_spliced: the same with the site that the SAE writes replaced by its reconstruction.
        ce_zero: the same with the site replaced by zero.
        ce_mean: the same with the site replaced by its mean over the text.
        kl: `KL(as it is || spliced)` of the next-token distributions.
        ce_everywhere: `ce_spliced` with every token replaced; None where every token counts.
    """

    tokens: int
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl: float
    ce_everywhere: float | None = None

    @property
    def delta_ce(self) -> float:
        """`ce_spliced - ce`."""
        return self.ce_spliced - self.ce

    @property
    def recovered_zero(self) -> float:
        """`(ce_zero - ce_spliced) / (ce_zero - ce)`: 1 is lossless, 0 as bad as zero ablation."""
        return _recovered(self.ce_zero, self.ce_spliced, self.ce)

    @property
    def recovered_mean(self) -> float:
        """`(ce_mean - ce_spliced) / (ce_mean - ce)`: 1 is lossless, 0 as bad as mean ablation."""
        return _recovered(self.ce_mean, self.ce_spliced, self.ce)


def _recovered(ablated: float, spliced: float, plain: float) -> float:
    return (ablated - spliced) / (ablated - plain) if ablated != plain else float("nan")


_ALL = ("spliced", "zero", "mean", "everywhere")


def evaluate_downstream(
    sae: SAE, source: ModelActivations, *, contexts: int | None = None, known: Downstream | None = None
) -> Downstream:
    """Runs the model as it is, spliced, and ablated in both ways (arXiv 2406.04093, section 4.1).

    Args:
        sae: SAE that reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        source: model and text.
        contexts: number of contexts to use, from the start; all by default.
        known: losses of another SAE of the same sites on the same contexts: what does not depend on the SAE
            is taken from there, and `ce_everywhere` is left out.

    Raises:
        SAEError: the SAE does not fit the sites, or the model predicts no tokens.
    """
    target = check_target(sae, source)
    require_decoder(source.model)
    parts = ("spliced",)
    mean = jnp.zeros(1, jnp.float32)
    tokens, limits = source.tokens[:contexts], limits_of(source)
    if known is None:
        mean = jnp.asarray(mean_activation(source, contexts, target), jnp.float32)
        # The model runs once more where some tokens are left out: with every token replaced.
        some = not source.by_place.all() or count_left_out(source, contexts).kept < tokens.size
        parts = _ALL if some else _ALL[:-1]
    weights = predicted_tokens(source)[:contexts]
    predicted = int(weights.sum())
    if not predicted:
        raise SAEError("the text has no token that follows another, so none is predicted; give other text.")
    total = np.zeros(2 + len(parts))
    passes = zip(
        token_batches(tokens, source.batch),
        token_batches(weights, source.batch),
        place_batches(source, contexts),
        strict=True,
    )
    how: dict[str, Any] = {
        "model": source.model,
        "sites": (source.sites[0], target),
        "deciding": source.sites,
        "parts": parts,
    }
    for (batch, real), (weight, _), by_place in passes:
        given = (sae, mean, limits, batch, weight, by_place)
        found = np.asarray(_losses(source.params, *given, **how), np.float64)
        total += found[:, :real].sum(axis=1)
    kl, ce, *others = (total / predicted).tolist()
    said = dict(zip(parts, others, strict=True))
    if known is not None:
        said = {"zero": known.ce_zero, "mean": known.ce_mean, **said}
    return Downstream(predicted, ce, said["spliced"], said["zero"], said["mean"], kl, said.get("everywhere"))


def predicted_tokens(source: ModelActivations) -> np.ndarray:
    """Which tokens but the first follow text and are text themselves: int32 `[contexts, length - 1]`."""
    if source.counted is None:
        return np.ones((len(source.tokens), source.tokens.shape[1] - 1), np.int32)
    return (source.counted[:, :-1] & source.counted[:, 1:]).astype(np.int32)


@partial(jax.jit, static_argnames=("model", "sites", "deciding", "parts"))
def _losses(
    params: Any,
    sae: SAE,
    mean: Array,
    limits: Array,
    tokens: Array,
    weight: Array,
    by_place: Array,
    *,
    model: Model,
    sites: tuple[str, str],
    deciding: tuple[str, ...],
    parts: tuple[str, ...],
) -> Array:
    """Sums over each context, `[2 + parts, batch]`: divergence of the first part, loss as it is, parts.

    `sites` are what the SAE reads and what it writes, `deciding` those whose norms decide which tokens count.
    """
    read, site = sites
    weight = weight.astype(jnp.float32)

    def hidden(edit: Any, *sites: str) -> dict[str, Array]:
        wanted = list(dict.fromkeys((UNEMBEDDED, *sites)))
        return model.apply(params, tokens, edit=edit, capture=wanted, logits=False).captured

    captured = hidden(None, read, *deciding)
    x, kept = captured[read], kept_in_pass(captured, deciding, limits, by_place)
    edits = {
        "spliced": splice_from(sae, x, kept),
        "zero": hold_at(kept, 0.0),
        "mean": hold_at(kept, mean),
        "everywhere": splice_from(sae, x),
    }
    passes = jnp.stack([captured[UNEMBEDDED], *(hidden({site: edits[p]})[UNEMBEDDED] for p in parts)])
    found, kl = token_losses(model, params, passes[:, :, :-1], tokens[:, 1:])
    losses = (found * weight[None]).sum(axis=2)
    return jnp.concatenate([(kl * weight).sum(axis=1)[None], losses])
