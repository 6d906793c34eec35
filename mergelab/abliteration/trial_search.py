"""Many trials in one program: random points, then moves from the best one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mergelab.abliteration.ablation import Ablation, Space
from mergelab.abliteration.behavior import (
    check_refusal_ids,
    first_token_logits,
    first_token_scores,
    refusal_score,
)
from mergelab.abliteration.prompts import Prompts
from mergelab.abliteration.removal import KeepNorms, ablate, abliterate_params
from mergelab.abliteration.search_journal import SearchJournal
from mergelab.abliteration.trials import SearchResult, Trial, cost_from, frontier
from mergelab.activations.losses import kl_divergence
from mergelab.errors import MergelabError
from mergelab.models.model import Model, Params
from mergelab.text.packing import EvaluationWindows

__all__ = ["Judge", "search_ablation"]


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
        borderline: Prompts | None = None,
    ) -> list[np.ndarray]:
        """Refusal, KL, and with a text the loss, with borderline prompts their refusal, as in `Trial`.

        Args:
            points: `[points, parameters]`, at most `at_once`.
            harmful: prompts.
            harmless: prompts.
            before: the logits `[n, vocab]` that the unedited model gives after `harmless`.
            windows: a text, or None.
            borderline: harmless prompts that tend to be refused, or None.
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

        def refusal(prompts: Prompts) -> np.ndarray:
            total = np.zeros(self.at_once)
            for part in prompts.batches(self.batch):
                nothing = np.zeros((len(part.tokens), before.shape[1]), before.dtype)
                score, _ = run(part.tokens, part.mask, self.ids, nothing)
                odds = np.asarray(score, np.float64)[:, : part.real]
                total += (1 / (1 + np.exp(-np.clip(odds, -60, 60)))).sum(axis=1)
            return total / len(prompts)

        kl, done = np.zeros(self.at_once), 0
        for part in harmless.batches(self.batch):
            rows = np.minimum(np.arange(done, done + len(part.tokens)), len(harmless) - 1)
            _, divergence = run(part.tokens, part.mask, self.ids, before[rows])
            kl += np.asarray(divergence, np.float64)[:, : part.real].sum(axis=1)
            done += part.real
        columns = [refusal(harmful), kl / len(harmless)]
        if windows is not None:
            columns.append(self._loss(windows, run.args[2]))
        if borderline is not None:
            columns.append(refusal(borderline))
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


def search_ablation(
    model: Model,
    params: Params,
    space: Space,
    harmful: Prompts,
    harmless: Prompts,
    refusal_ids: Sequence[int] | np.ndarray,
    *,
    trials: int = 64,
    rounds: int = 4,
    kl_weight: float = 1.0,
    loss_weight: float = 1.0,
    start: np.ndarray | None = None,
    keep_norms: KeepNorms = None,
    windows: EvaluationWindows | None = None,
    borderline: Prompts | None = None,
    batch: int = 16,
    at_once: int = 4,
    seed: int = 0,
    journal: SearchJournal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Random points, then moves along each coordinate from the best one, halved when none improves.

    The search descends in `refusals + kl_weight * kl + loss_weight * (loss - loss of the unedited model)`;
    all trials are reported, and the frontier does not depend on the weights. Refusals are those of harmful
    prompts, and where there are borderline prompts those of these besides.

    Trials are measured as they would be written: by site edits, vmapped over `at_once` trials that share the
    weights, or one after the other by edited weights where norms are kept or a tied embedding is edited.
    Equal arguments give equal trials.

    Args:
        model: a decoder.
        params: its parameters, on any mesh.
        space: the parameters and their ranges.
        harmful: prompts that were not used to find the directions.
        harmless: the same.
        refusal_ids: tokens that begin a refusal.
        trials: random points, `start` counted.
        rounds: number of rounds of moves along coordinates, each with two trials for every coordinate.
        kl_weight: how much a nat of KL counts against a refusal.
        loss_weight: how much a nat of loss on the text does.
        start: the first point; the plain removal everywhere (`Space.plain()`) if None.
        keep_norms: norms that the matrices keep.
        windows: a text whose loss is a third figure, or None.
        borderline: harmless prompts that tend to be refused, which are a further figure, or None.
        batch: prompts (or windows) in one forward pass.
        at_once: trials in one forward pass.
        seed: draws the points.
        journal: what an earlier run of equal arguments has measured, which is not measured again; new figures
            are added to it.
        progress: called with the number of trials done and of all.

    Raises:
        MergelabError: there are no trials, or no such tokens.
    """
    if trials < 1:
        raise MergelabError(f"the search was given {trials} trials; give it at least 1.")
    ids = check_refusal_ids(model, refusal_ids)
    by_sites = keep_norms is None and not model.config.tied
    judge = Judge(model, params, space, ids, keep_norms, by_sites, batch, at_once if by_sites else 1)
    _, _, before = first_token_scores(model, params, harmless, ids, batch=batch)
    judge_all = partial(
        judge.figures,
        harmful=harmful,
        harmless=harmless,
        before=before,
        windows=windows,
        borderline=borderline,
    )
    size, total = len(space.names), trials + rounds * 2 * len(space.names)
    known = 0  # rows of the journal that have been used

    def measured(new: np.ndarray) -> list[np.ndarray]:
        """The figures of some points, at most `judge.at_once`."""
        nonlocal known
        recorded = []
        if journal is not None:
            count = 2 + (windows is not None) + (borderline is not None)
            rows = (journal.row(known + n, point.tolist(), count) for n, point in enumerate(new))
            recorded = [np.array(row) for row in rows if row is not None]
        fresh = list(judge_all(new[len(recorded) :])) if len(recorded) < len(new) else []
        if journal is not None and fresh:
            journal.record(new[len(recorded) :].tolist(), [row.tolist() for row in fresh])
        known += len(new)
        return recorded + fresh

    nothing = measured(space.nothing()[None])[0]
    baseline = _trial(space, space.nothing(), nothing, 0, windows is not None)
    cost = cost_from(baseline, kl_weight, loss_weight)
    points = [space.plain() if start is None else space.clip(start), *space.draw(trials - 1, seed)]
    found: list[Trial] = []

    def measure(new: np.ndarray) -> None:
        for first in range(0, len(new), judge.at_once):
            part = new[first : first + judge.at_once]
            for point, row in zip(part, measured(part), strict=True):
                found.append(_trial(space, point, row, len(found) + 1, windows is not None))
            if progress is not None:
                progress(len(found), total)

    measure(np.stack(points))
    step = 0.25
    for _ in range(rounds):
        best = min(range(len(found)), key=lambda i: cost(found[i]))
        moves = np.concatenate([np.eye(size), -np.eye(size)]) * step * (space.high - space.low)[None]
        new = space.clip(points[best][None] + moves)
        points += list(new)
        measure(new)
        if min(map(cost, found[-len(new) :])) >= cost(found[best]):
            step /= 2
    trials_made = tuple(found)
    return SearchResult(trials_made, frontier(trials_made), baseline)


def _trial(space: Space, point: np.ndarray, row: np.ndarray, number: int, with_loss: bool) -> Trial:
    parameters = dict(zip(space.names, map(float, point), strict=True))
    refusal, kl, *more = map(float, row)
    loss = more.pop(0) if with_loss else None
    return Trial(parameters, refusal, kl, loss, more[0] if more else None, number)
