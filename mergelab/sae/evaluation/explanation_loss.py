"""What explanations are worth to the model: its loss with simulated activations in place of the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.losses import UNEMBEDDED, token_losses
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.models.model import Model
from mergelab.models.residual_stream import require_decoder
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.features.explanations import LatentExplanation, Match, judge_explanation, mean_match
from mergelab.sae.features.n2g import explain, match_explanations
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE
from mergelab.sae.splice import kept_in_pass, limits_of, place_batches, token_batches, token_rows
from mergelab.sae.subject_model import check_target

__all__ = ["ExplanationScore", "score_explanations"]


@dataclass(frozen=True)
class ExplanationScore:
    """Explanations of some latents, judged on held-out text.

    Attributes:
        matches: precision and recall, in the order of the explanations.
        tokens: predicted tokens of the losses below.
        ce: cross-entropy of the model as it is, nats per token.
        ce_simulated: the same with the explained latents at their simulated activations, all else kept, as
            are tokens that do not count.
        ce_ablated: the same with the explained latents at zero, all else kept.
    """

    matches: tuple[Match, ...]
    tokens: int
    ce: float
    ce_simulated: float
    ce_ablated: float

    @property
    def precision(self) -> float:
        """Mean over the explanations that name a token."""
        return mean_match(self.matches)[0]

    @property
    def recall(self) -> float:
        """Mean over the latents that are active."""
        return mean_match(self.matches)[1]

    @property
    def delta_ce(self) -> float:
        """`ce_simulated - ce`, the explanation loss, in nats per token."""
        return self.ce_simulated - self.ce

    @property
    def recovered(self) -> float:
        """`(ce_ablated - ce_simulated) / (ce_ablated - ce)`: 1 is as good as the latents themselves."""
        gap = self.ce_ablated - self.ce
        return (self.ce_ablated - self.ce_simulated) / gap if gap else float("nan")


def score_explanations(
    sae: SAE, source: ModelActivations, explanations: Sequence[LatentExplanation]
) -> ExplanationScore:
    """Simulates the latents on a text, compares, and splices the simulations in with the error kept.

    Args:
        sae: SAE that reads the first of the source's sites; its latents are edited at the one it writes.
        source: model and text; a text the explanations are not made of.
        explanations: explanations of distinct latents.

    Raises:
        SAEError: the SAE does not fit the site, or the model predicts no tokens.
    """
    target = check_target(sae, source)
    require_decoder(source.model)
    latents = jnp.asarray([explanation.latent for explanation in explanations], jnp.int32)

    total = np.zeros(3)
    promised: list[np.ndarray] = []
    true: list[np.ndarray] = []
    limits = limits_of(source)
    for (tokens, real), by_place in zip(
        token_batches(source.tokens, source.batch), place_batches(source), strict=True
    ):
        rows = np.asarray(tokens).tolist()
        simulated = np.stack([[e.simulate(row) for e in explanations] for row in rows]).transpose(0, 2, 1)
        losses, codes, kept = _losses(
            source.params,
            sae,
            latents,
            limits,
            tokens,
            by_place,
            jnp.asarray(simulated),
            model=source.model,
            sites=(source.sites[0], target),
            deciding=source.sites,
        )
        total += np.asarray(losses, np.float64)[:, :real].sum(axis=1)
        counted = np.asarray(kept)[:real]
        promised.append(simulated[:real][counted])
        true.append(np.asarray(codes)[:real][counted])
    said, there = np.concatenate(promised), np.concatenate(true)
    matches = tuple(judge_explanation(said[..., i], there[..., i]) for i in range(len(explanations)))
    predicted = len(source.tokens) * (source.tokens.shape[1] - 1)
    return ExplanationScore(matches, predicted, *(float(value) for value in total / predicted))


@partial(jax.jit, static_argnames=("model", "sites", "deciding"))
def _losses(
    params: Any,
    sae: SAE,
    latents: Array,
    limits: Array,
    tokens: Array,
    by_place: Array,
    simulated: Array,
    *,
    model: Model,
    sites: tuple[str, str],
    deciding: tuple[str, ...],
) -> tuple[Array, Array, Array]:
    """Sums over each context `[3, batch]`: as it is, simulated, ablated; the true codes; what counts."""
    read, site = sites

    def replaced(values: Array) -> Any:
        changed = every.at[:, latents].set(values.reshape(len(rows), -1))
        change = sae.reconstruct(rows, changed) - sae.reconstruct(rows, every)
        change = jnp.where(kept.reshape(-1, 1), change, 0)
        return {site: lambda y: y + change.reshape(y.shape).astype(y.dtype)}

    def hidden(edit: Any, *sites: str) -> dict[str, Array]:
        wanted = list(dict.fromkeys((UNEMBEDDED, *sites)))
        return model.apply(params, tokens, edit=edit, capture=wanted, logits=False).captured

    captured = hidden(None, read, *deciding)
    x, kept = captured[read], kept_in_pass(captured, deciding, limits, by_place)
    rows = token_rows(x)
    every = sae.encode(rows)
    edits = (replaced(simulated), replaced(jnp.zeros_like(simulated)))
    passes = jnp.stack([captured[UNEMBEDDED], *(hidden(edit)[UNEMBEDDED] for edit in edits)])
    losses, _ = token_losses(model, params, passes[:, :, :-1], tokens[:, 1:])
    return losses.sum(axis=2), every[:, latents].reshape(simulated.shape), kept


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    causal = "logits" in evidence
    if causal:
        check_target(sae, evidence.judge)  # before the work of explaining

    def drawn(density: np.ndarray) -> list[int]:
        active = np.flatnonzero(density > 0)
        return np.random.default_rng(options.seed).permutation(active)[: options.explained].tolist()

    seen = survey(sae, evidence.fit, count=8, latents=drawn)
    if not (seen.density > 0).any():
        raise SAEError("no latent is active in the first half of the text; give other text, or more.")
    explained = explain(sae, evidence.fit, seen.examples, mask_token=evidence.get("mask_token", 0))
    judge = score_explanations if causal else match_explanations
    found = judge(sae, evidence.judge, list(explained.values()))
    matches = found.matches if isinstance(found, ExplanationScore) else found
    many = f"N2G of {len(explained)} latents, on text they are not made of"
    for name, value in zip(("precision", "recall"), mean_match(matches), strict=True):
        yield name, value, f"{many}; 1 perfect"
    if not isinstance(found, ExplanationScore):
        return  # an encoder predicts nothing that an explanation could cost
    yield "delta_ce", found.delta_ce, "these latents simulated; 0 is lossless"
    yield "recovered", found.recovered, "1 lossless, 0 as bad as these latents at zero"


METRIC = Metric(
    name="explanations",
    about="token patterns (N2G) that explain latents",
    units={"precision": "", "recall": "", "delta_ce": "nats / token", "recovered": ""},
    measure=_scores,
)
