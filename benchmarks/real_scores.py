"""The scores of benchmarks/sae_real.py, each by the library's own evaluation, of many SAEs of one text.

What does not depend on the SAE is computed once: the activations of the text, and the model's own loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import numpy as np
from jax import Array

from mergelab.activations import ModelActivations
from mergelab.activations.kept import short_enough
from mergelab.activations.losses import UNEMBEDDED, token_losses
from mergelab.models.model import Model
from mergelab.sae.evaluation.metric import Evidence, Options
from mergelab.sae.evaluation.probing import rows_with_labels, sparse_probe
from mergelab.sae.evaluation.reconstruction import METRIC as RECONSTRUCTION
from mergelab.sae.features.explanations import mean_match
from mergelab.sae.features.n2g import explain, match_explanations
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE
from mergelab.sae.splice import limits_of, place_batches, splice_from, token_batches

__all__ = ["Judge", "RememberedActivations"]


class RememberedActivations(ModelActivations):
    """Activations that are computed once for all who read the same rows of the same tokens."""

    _known: ClassVar[dict[Any, tuple[np.ndarray, ...]]] = {}

    def _compute(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        key = (self.sites, start, stop, hash(self.tokens.tobytes()))
        if key not in self._known:
            self._known[key] = super()._compute(start, stop)
        return self._known[key]


@dataclass(frozen=True)
class Judge:
    """The text that judges, and how much of it for what.

    Attributes:
        source: the model and held-out text; its second half is judged.
        labels: answers to probing tasks, by name.
        mask_token: token that takes the place of others in explanations.
        spliced: number of judged contexts whose loss is taken.
        explained: number of latents that are explained, from `examples` examples each.
        examples: examples of an explanation.
    """

    source: ModelActivations
    labels: Mapping[str, np.ndarray]
    mask_token: int
    spliced: int
    explained: int
    examples: int

    @cached_property
    def evidence(self) -> Evidence:
        """The text with its answers."""
        return Evidence(self.source, {"labels": self.labels, "mask_token": self.mask_token})

    def reconstruction(self, sae: SAE) -> dict[str, float]:
        """Error over variance, and the fraction of latents that are active on some token."""
        found = RECONSTRUCTION.scores(sae, self.evidence, Options())
        return {
            "fvu": found["reconstruction.nmse"].value,
            "alive": found["reconstruction.alive"].value,
            "l0": found["reconstruction.l0"].value,
        }

    def spliced_loss(self, sae: SAE | None) -> float:
        """Nats per predicted token, the SAE's reconstruction in place of tokens that count; None: as it is.

        `evaluate_downstream` says the same, with four more passes of the model.
        """
        judged = self.evidence.judge
        judged = replace(judged, tokens=judged.tokens[: self.spliced], counted=None)
        limits = limits_of(judged)
        total = 0.0
        for (tokens, real), places in zip(
            token_batches(judged.tokens, judged.batch), place_batches(judged), strict=True
        ):
            how: dict[str, Any] = {"model": judged.model, "site": judged.sites[0]}
            found = _loss(judged.params, sae, limits, tokens, places, **how)
            total += float(np.asarray(found, np.float64)[:real].sum())
        return total / (len(judged.tokens) * (judged.tokens.shape[1] - 1))

    def probing(self, sae: SAE) -> dict[str, float]:
        """F1 of probes on one and on five latents, the mean of all tasks."""
        codes, tasks = rows_with_labels(sae, self.evidence, lambda one, x: one.encode(x))
        return {
            f"f1_{k}": float(np.mean([sparse_probe(codes, label, k).f1 for label in tasks.values()]))
            for k in (1, 5)
        }

    def explanations(self, sae: SAE, seed: int = 0) -> dict[str, float]:
        """Precision, recall and their harmonic mean of token patterns on text that they are not made of."""

        def drawn(density: np.ndarray) -> list[int]:
            active = np.flatnonzero(density > 0)
            return np.random.default_rng(seed).permutation(active)[: self.explained].tolist()

        fit, judged = self.evidence.fit, self.evidence.judge
        seen = survey(sae, fit, count=self.examples, latents=drawn)
        explained = explain(sae, fit, seen.examples, mask_token=self.mask_token)
        precision, recall = mean_match(match_explanations(sae, judged, list(explained.values())))
        mean = 2 * precision * recall / max(precision + recall, 1e-12)
        return {"n2g_precision": precision, "n2g_recall": recall, "n2g_f1": mean}


@partial(jax.jit, static_argnames=("model", "site"))
def _loss(
    params: Any, sae: SAE | None, limits: Array, tokens: Array, by_place: Array, *, model: Model, site: str
) -> Array:
    def spliced(x: Array) -> Array:
        assert sae is not None
        return splice_from(sae, x, by_place & short_enough(x, limits[0]))(x)

    edit = None if sae is None else {site: spliced}
    hidden = model.apply(params, tokens, edit=edit, capture=[UNEMBEDDED], logits=False).captured[UNEMBEDDED]
    losses, _ = token_losses(model, params, hidden[None, :, :-1], tokens[:, 1:])
    return losses[0].sum(axis=1)
