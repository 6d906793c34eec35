"""What the model loses with reconstructions in place of activations."""

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
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.training_curve import LossCurve, compute_equivalent, predicted_tokens
from mergelab.sae.sae import SAE
from mergelab.sae.splice import (
    kept_in_pass,
    limits_of,
    mean_activation,
    place_batches,
    splice_from,
    token_batches,
    where_kept,
)
from mergelab.sae.subject_model import check_target

__all__ = ["Downstream", "evaluate_downstream"]


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


def evaluate_downstream(sae: SAE, source: ModelActivations, *, contexts: int | None = None) -> Downstream:
    """Runs the model as it is, spliced, and ablated in both ways (arXiv 2406.04093, section 4.1).

    Args:
        sae: SAE that reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        source: model and text.
        contexts: number of contexts to use, from the start; all by default.

    Raises:
        SAEError: the SAE does not fit the sites, or the model predicts no tokens.
    """
    target = check_target(sae, source)
    require_decoder(source.model)
    mean = jnp.asarray(mean_activation(source, contexts, target), jnp.float32)
    sites = (source.sites[0], target)
    tokens, limits = source.tokens[:contexts], limits_of(source)
    weights = predicted_tokens(source)[:contexts]
    predicted = int(weights.sum())
    if not predicted:
        raise SAEError("the text has no token that follows another, so none is predicted; give other text.")
    # The model runs once more where some tokens are left out: with every token replaced.
    some = not source.by_place.all() or count_left_out(source, contexts).kept < tokens.size
    total = np.zeros(6 if some else 5)
    passes = zip(
        token_batches(tokens, source.batch),
        token_batches(weights, source.batch),
        place_batches(source, contexts),
        strict=True,
    )
    for (batch, real), (weight, _), by_place in passes:
        given = (sae, mean, limits, batch, weight, by_place)
        how: dict[str, Any] = {"model": source.model, "sites": sites, "deciding": source.sites}
        found = np.asarray(_losses(source.params, *given, **how, everywhere=some), np.float64)
        total += found[:, :real].sum(axis=1)
    return Downstream(predicted, *(float(value) for value in total / predicted))


@partial(jax.jit, static_argnames=("model", "sites", "deciding", "everywhere"))
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
    everywhere: bool,
) -> Array:
    """Sums over each context, `[5 or 6, batch]`, in the order of the fields of `Downstream`.

    `sites` are what the SAE reads and what it writes, `deciding` those whose norms decide which tokens count.
    """
    read, site = sites
    weight = weight.astype(jnp.float32)

    def hidden(edit: Any, *sites: str) -> dict[str, Array]:
        wanted = list(dict.fromkeys((UNEMBEDDED, *sites)))
        return model.apply(params, tokens, edit=edit, capture=wanted, logits=False).captured

    captured = hidden(None, read, *deciding)
    x, kept = captured[read], kept_in_pass(captured, deciding, limits, by_place)

    def zero(y: Array) -> Array:
        return where_kept(kept, jnp.zeros((1, 1, 1), y.dtype), y)

    def middle(y: Array) -> Array:
        return where_kept(kept, mean[None, None], y)

    edits = [splice_from(sae, x, kept), zero, middle, *([splice_from(sae, x)] if everywhere else [])]
    passes = jnp.stack([captured[UNEMBEDDED], *(hidden({site: edit})[UNEMBEDDED] for edit in edits)])
    found, kl = token_losses(model, params, passes[:, :, :-1], tokens[:, 1:])
    losses = (found * weight[None]).sum(axis=2)
    return jnp.concatenate([losses[:4], (kl * weight).sum(axis=1)[None], losses[4:]])


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    found = evaluate_downstream(sae, evidence.judge)
    yield "delta_ce", found.delta_ce, f"over the model's own {found.ce:.4f}; 0 is lossless"
    yield "kl", found.kl, "from the model's own next-token distribution; 0 is lossless"
    yield "recovered_zero", found.recovered_zero, "1 lossless, 0 as bad as zero ablation"
    yield "recovered_mean", found.recovered_mean, "1 lossless, 0 as bad as mean ablation"
    if found.ce_everywhere is not None:
        every = found.ce_everywhere - found.ce
        yield "delta_ce_all", every, "delta_ce with tokens that do not count replaced too"
    if "curve" in evidence:
        curve = evidence.get("curve")
        steps, losses = curve.around(found.ce_spliced) if isinstance(curve, LossCurve) else curve
        part = compute_equivalent(steps, losses, found.ce_spliced)
        yield "compute_equivalent", part, "fraction of the model's training with the same loss"


METRIC = Metric(
    name="downstream",
    about="loss of the model with the reconstruction spliced in",
    units={
        "delta_ce": "nats / token",
        "kl": "nats / token",
        "recovered_zero": "",
        "recovered_mean": "",
        "delta_ce_all": "nats / token",
        "compute_equivalent": "",
    },
    measure=_scores,
    needs=("logits",),
)
