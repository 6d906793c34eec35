"""Many trials in one program, and the best of each rate of refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from mergelab.activations.losses import kl_divergence
from mergelab.errors import MergelabError, SearchError
from mergelab.models.model import Model, Params
from mergelab.text.packing import EvaluationWindows

__all__ = ["Judge", "SearchResult", "Trial", "frontier", "search_ablation"]


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


@dataclass(frozen=True)
class Trial:
    """One point of the space and its figures, on prompts that were not used to find directions.

    Attributes:
        parameters: values by name, as `Space` describes them.
        refusal: mean probability that the first token of an answer to a harmful prompt is a refusal token.
        kl: mean KL in nats of the first token of harmless answers, from the unedited model's.
        loss: cross-entropy on the text, nats per token; None without a text.
    """

    parameters: Mapping[str, float]
    refusal: float
    kl: float
    loss: float | None

    @property
    def figures(self) -> tuple[float, ...]:
        """What is to be small."""
        return (self.refusal, self.kl) if self.loss is None else (self.refusal, self.kl, self.loss)


@dataclass(frozen=True)
class SearchResult:
    """Every trial in order, the first being the starting point.

    Attributes:
        trials: the trials.
        frontier: those that no other beats in every figure, by refusal.
        baseline: the figures of the unedited model: refusal, KL (0) and loss.
    """

    trials: tuple[Trial, ...]
    frontier: tuple[Trial, ...]
    baseline: Trial

    def best(self, max_kl: float) -> Trial:
        """The trial that refuses least among those of at most `max_kl`.

        Raises:
            SearchError: none moves harmless answers so little; `trace` holds them all.
        """
        passing = [trial for trial in self.trials if trial.kl <= max_kl]
        if not passing:
            least = min(trial.kl for trial in self.trials)
            raise SearchError(
                f"no trial has a KL of at most {max_kl:g} (the least of {len(self.trials)} is {least:.3g}); "
                "search longer, or allow more.",
                {
                    "max_kl": max_kl,
                    "baseline": asdict(self.baseline),
                    "trials": list(map(asdict, self.trials)),
                },
            )
        return min(passing, key=lambda trial: (trial.refusal, trial.kl))


def frontier(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The trials that no other equals or beats in every figure while beating it in one, by refusal."""
    figures = np.array([trial.figures for trial in trials])
    no_worse = (figures[:, None] <= figures[None]).all(-1)
    better = (figures[:, None] < figures[None]).any(-1)
    beaten = np.flatnonzero((no_worse & better).any(axis=0)).tolist()
    kept = (trial for n, trial in enumerate(trials) if n not in beaten)
    return tuple(sorted(kept, key=lambda trial: trial.refusal))


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
    batch: int = 16,
    at_once: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Random points, then moves along each coordinate from the best one, halved when none improves.

    The search descends in `refusal + kl_weight * kl + loss_weight * (loss - loss of the unedited model)`; all
    trials are reported, and the frontier does not depend on the weights.

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
        batch: prompts (or windows) in one forward pass.
        at_once: trials in one forward pass.
        seed: draws the points.
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
    judge_all = partial(judge.figures, harmful=harmful, harmless=harmless, before=before, windows=windows)
    nothing = judge_all(space.nothing()[None])[0]
    size, total = len(space.names), trials + rounds * 2 * len(space.names)
    points = [space.plain() if start is None else space.clip(start), *space.draw(trials - 1, seed)]
    figures: list[np.ndarray] = []

    def measure(new: np.ndarray) -> None:
        for start in range(0, len(new), judge.at_once):
            figures.extend(judge_all(new[start : start + judge.at_once]))
            if progress is not None:
                progress(len(figures), total)

    def cost(row: np.ndarray) -> float:
        value = row[0] + kl_weight * row[1] + (loss_weight * (row[2] - nothing[2]) if len(row) > 2 else 0.0)
        return float(value) if np.isfinite(value) else np.inf

    measure(np.stack(points))
    step = 0.25
    for _ in range(rounds):
        best = min(range(len(figures)), key=lambda i: cost(figures[i]))
        moves = np.concatenate([np.eye(size), -np.eye(size)]) * step * (space.high - space.low)[None]
        new = space.clip(points[best][None] + moves)
        points += list(new)
        measure(new)
        if min(cost(row) for row in figures[-len(new) :]) >= cost(figures[best]):
            step /= 2
    found = tuple(_trial(space, point, row) for point, row in zip(points, figures, strict=True))
    return SearchResult(found, frontier(found), _trial(space, space.nothing(), nothing))


def _trial(space: Space, point: np.ndarray, row: np.ndarray) -> Trial:
    parameters = dict(zip(space.names, map(float, point), strict=True))
    return Trial(parameters, float(row[0]), float(row[1]), float(row[2]) if len(row) > 2 else None)
