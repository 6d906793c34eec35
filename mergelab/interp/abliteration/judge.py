"""Measures many ablations of one model: refusals, divergence and loss, for several trials in one program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.interp.abliteration.ablation import Ablation
from mergelab.interp.abliteration.prompts import Prompts
from mergelab.interp.abliteration.runtime import ablate
from mergelab.interp.abliteration.scores import first_token_logits, kl_divergence, refusal_score
from mergelab.interp.abliteration.space import Space
from mergelab.interp.abliteration.weights import KeepNorms, abliterate_params
from mergelab.models.model import Model, Params
from mergelab.text.packing import EvaluationWindows

__all__ = ["Judge"]


@dataclass(frozen=True)
class Judge:
    """Measures points of a space on sets of prompts, several in one forward pass.

    Attributes:
        model: a decoder.
        params: its parameters, unedited.
        space: what the points mean.
        ids: tokens that begin a refusal.
        keep_norms: norms that the matrices keep.
        by_sites: edit sites, so that trials share the weights, in place of editing weights for each trial.
        batch: prompts (or windows) in one forward pass.
        at_once: trials in one forward pass.
    """

    model: Model
    params: Params
    space: Space
    ids: np.ndarray
    keep_norms: KeepNorms
    by_sites: bool
    batch: int
    at_once: int

    def figures(
        self,
        points: np.ndarray,
        *,
        harmful: Prompts,
        harmless: Prompts,
        before: np.ndarray,
        windows: EvaluationWindows | None,
    ) -> list[np.ndarray]:
        """Refusal, KL and (with a text) loss of each point, as in `Trial`.

        Args:
            points: `[points, parameters]`, at most `at_once`.
            harmful: prompts.
            harmless: prompts.
            before: the logits `[n, vocab]` that the unedited model gives after `harmless`.
            windows: a text, or None.
        """
        count = len(points)
        filled = np.concatenate([points, np.repeat(points[-1:], self.at_once - count, axis=0)])
        run = partial(
            _judge,
            self.model,
            self.params,
            self.space.ablation(jnp.asarray(filled, jnp.float32)),
            keep_norms=self.keep_norms,
            by_sites=self.by_sites,
        )
        refusal, kl = np.zeros(self.at_once), np.zeros(self.at_once)
        for part in harmful.batches(self.batch):
            score, _ = run(part.tokens, part.mask, self.ids, np.zeros_like(before[: len(part.tokens)]))
            odds = np.asarray(score, np.float64)[:, : part.real]
            refusal += (1 / (1 + np.exp(-np.clip(odds, -60, 60)))).sum(axis=1)
        done = 0
        for part in harmless.batches(self.batch):
            rows = np.minimum(np.arange(done, done + len(part.tokens)), len(harmless) - 1)
            _, divergence = run(part.tokens, part.mask, self.ids, before[rows])
            kl += np.asarray(divergence, np.float64)[:, : part.real].sum(axis=1)
            done += part.real
        columns = [refusal / len(harmful), kl / len(harmless)]
        if windows is not None:
            columns.append(self._loss(windows, run.args[2]))
        return list(np.stack(columns, axis=1)[:count])

    def _loss(self, windows: EvaluationWindows, ablations: Ablation) -> np.ndarray:
        total = np.zeros(self.at_once)
        for start in range(0, len(windows.tokens), self.batch):
            wanted = np.arange(start, start + self.batch)
            rows = np.minimum(wanted, len(windows.tokens) - 1)
            counted = windows.is_target[rows] & (wanted < len(windows.tokens))[:, None]
            total += np.asarray(
                _losses(
                    self.model,
                    self.params,
                    ablations,
                    windows.tokens[rows],
                    counted,
                    keep_norms=self.keep_norms,
                    by_sites=self.by_sites,
                ),
                np.float64,
            )
        return total / int(windows.is_target.sum())


def _edited(
    model: Model, params: Params, ablation: Ablation, keep_norms: KeepNorms, by_sites: bool
) -> tuple[Params, dict[str, Any]]:
    if by_sites:
        return params, ablate(model, params, ablation)
    return abliterate_params(model, params, ablation, keep_norms=keep_norms), {}


@partial(jax.jit, static_argnames=("model", "keep_norms", "by_sites"))
def _judge(
    model: Model,
    params: Params,
    ablations: Ablation,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    ids: Int[Array, " refusals"],
    before: Float[Array, "batch vocab"],
    *,
    keep_norms: KeepNorms,
    by_sites: bool,
) -> tuple[Float[Array, "trials batch"], Float[Array, "trials batch"]]:
    """Refusal scores and divergences of a batch under each of several ablations."""

    def one(ablation: Ablation) -> tuple[Array, Array]:
        edited, edit = _edited(model, params, ablation, keep_norms, by_sites)
        logits = first_token_logits(model, edited, tokens, mask, edit)
        return refusal_score(logits, ids), kl_divergence(before, logits)

    return jax.vmap(one)(ablations) if by_sites else jax.lax.map(one, ablations)


@partial(jax.jit, static_argnames=("model", "keep_norms", "by_sites"))
def _losses(
    model: Model,
    params: Params,
    ablations: Ablation,
    tokens: Int[Array, "batch length_plus_1"],
    counted: Bool[Array, "batch length"],
    *,
    keep_norms: KeepNorms,
    by_sites: bool,
) -> Float[Array, " trials"]:
    """Summed cross-entropy of the counted tokens under each of several ablations."""

    def one(ablation: Ablation) -> Array:
        edited, edit = _edited(model, params, ablation, keep_norms, by_sites)
        logits = model.apply(edited, tokens[:, :-1], edit=edit).logits
        assert logits is not None
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))

    return jax.vmap(one)(ablations) if by_sites else jax.lax.map(one, ablations)
