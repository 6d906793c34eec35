"""Searches that a verifier guides, over steps of any kind: particle filtering, beam search, DVTS.

What a state is, how it is extended (by a sampled step of text, say) and what it is worth come in as
functions, which take many states at once, so that a model may read them as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from mergelab.decoding.transforms import require

__all__ = ["FoundStates", "guided_beams", "guided_trees", "particle_filter", "systematic_resample"]

S = TypeVar("S")
Extend = Callable[[Sequence[S]], Sequence[S]]
"""Each state with one more step; the same state given twice may go on in two ways."""
Score = Callable[[Sequence[S]], Sequence[float]]
"""What each state is worth, such as the probability that it is right so far."""


@dataclass(frozen=True)
class FoundStates(Generic[S]):
    """States at the end of a search, the best first.

    Attributes:
        states: the states.
        scores: what each is worth.
        extended: number of steps that were made in all.
    """

    states: tuple[S, ...]
    scores: tuple[float, ...]
    extended: int


def guided_beams(
    root: S,
    extend: Extend[S],
    score: Score[S],
    *,
    width: int,
    branch: int,
    steps: int,
    done: Callable[[S], bool] = lambda _: False,
) -> FoundStates[S]:
    """Beam search by a verifier: the best `width` of `width * branch` states go on at each step.

    With a proposer that lists thoughts it searches a tree of thoughts (arXiv:2305.10601).

    Args:
        root: the state to begin with.
        extend: makes one more step; called with `branch` copies of each state that is not done.
        score: worth of states.
        width: number of states that go on.
        branch: number of ways in which each is extended.
        steps: most steps of a state.
        done: whether a state is at its end; it competes with the others as it is.

    Raises:
        DecodingError: a number is not positive, or a score is NaN.
    """
    for name, value in (("width", width), ("branch", branch), ("steps", steps)):
        require(f"guided_beams({name})", value, value >= 1, "at least 1")
    states, scores, extended = [root], [-math.inf], 0
    for _ in range(steps):
        live = [state for state in states if not done(state)]
        if not live:
            break
        new = list(extend([state for state in live for _ in range(branch)]))
        extended += len(new)
        kept = [(state, worth) for state, worth in zip(states, scores, strict=True) if done(state)]
        ranked = sorted([*kept, *zip(new, _scores(score, new), strict=True)], key=lambda pair: -pair[1])
        states, scores = [one for one, _ in ranked[:width]], [worth for _, worth in ranked[:width]]
    return FoundStates(tuple(states), tuple(scores), extended)


def guided_trees(
    root: S,
    extend: Extend[S],
    score: Score[S],
    *,
    trees: int,
    branch: int,
    steps: int,
    done: Callable[[S], bool] = lambda _: False,
) -> FoundStates[S]:
    """Diverse verifier tree search (DVTS): as many greedy searches side by side, none of which ends another.

    Each tree is a `guided_beams` of width 1, so that answers stay diverse where one beam would fill up with
    one beginning.

    Args:
        root: the state to begin with.
        extend: makes one more step; called once a step, with `branch` copies for each tree that is not done.
        score: worth of states.
        trees: number of trees.
        branch: number of ways in which each is extended.
        steps: most steps of a state.
        done: whether a state is at its end.

    Raises:
        DecodingError: a number is not positive, or a score is NaN.
    """
    for name, value in (("trees", trees), ("branch", branch), ("steps", steps)):
        require(f"guided_trees({name})", value, value >= 1, "at least 1")
    states, scores, extended = [root] * trees, [-math.inf] * trees, 0
    for _ in range(steps):
        live = [number for number, state in enumerate(states) if not done(state)]
        if not live:
            break
        new = list(extend([states[number] for number in live for _ in range(branch)]))
        extended += len(new)
        worth = _scores(score, new)
        for place, number in enumerate(live):
            best = max(range(place * branch, (place + 1) * branch), key=lambda at: worth[at])
            states[number], scores[number] = new[best], worth[best]
    order = sorted(range(trees), key=lambda number: -scores[number])
    return FoundStates(tuple(states[n] for n in order), tuple(scores[n] for n in order), extended)


def particle_filter(
    root: S,
    extend: Extend[S],
    score: Score[S],
    *,
    particles: int,
    steps: int,
    seed: int = 0,
    done: Callable[[S], bool] = lambda _: False,
) -> FoundStates[S]:
    """Particles that are extended, and drawn anew in proportion to what they are worth (arXiv:2502.01618).

    A worth is a likelihood of the whole state so far: a particle weighs its worth over that before its step,
    and in the end states are draws of the proposals times their worth, for many particles.

    Args:
        root: the state to begin with, whose worth is 1.
        extend: makes one more step; called with all particles that are not done.
        score: worth of states, at least 0.
        particles: number of particles.
        steps: most steps of a state.
        seed: seed of the draws.
        done: whether a state is at its end; it is kept, or dropped, with the others.

    Raises:
        DecodingError: a number is not positive, or a worth is NaN or negative.
    """
    for name, value in (("particles", particles), ("steps", steps)):
        require(f"particle_filter({name})", value, value >= 1, "at least 1")
    rng = np.random.default_rng(seed)
    states, before, extended = [root] * particles, np.ones(particles), 0
    for _ in range(steps):
        live = [number for number, state in enumerate(states) if not done(state)]
        if not live:
            break
        new = list(extend([states[number] for number in live]))
        extended += len(new)
        worth = before.copy()
        worth[live] = _scores(score, new)
        require("particle_filter(score)", float(worth.min()), bool((worth >= 0).all()), "at least 0")
        for number, state in zip(live, new, strict=True):
            states[number] = state
        weights = np.divide(worth, before, out=np.zeros(particles), where=before > 0)
        if not weights.sum() > 0:  # nothing is worth anything: all go on as they are
            continue
        drawn = systematic_resample(weights, rng)
        states, before = [states[number] for number in drawn], worth[drawn]
    order = np.argsort(-before, kind="stable")
    return FoundStates(tuple(states[n] for n in order), tuple(map(float, before[order])), extended)


def systematic_resample(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws in proportion to weights, as many as those: each its expected number of times, or one beside.

    Args:
        weights: weights, at least 0, some of them positive.
        rng: generator of the one random number that it takes.
    """
    ends = np.cumsum(weights) / weights.sum()
    places = (np.arange(len(weights)) + rng.random()) / len(weights)
    return np.minimum(np.searchsorted(ends, places, side="right"), np.flatnonzero(weights)[-1])


def _scores(score: Score[S], states: Sequence[S]) -> list[float]:
    found = [float(worth) for worth in score(states)]
    require("score", len(found), len(found) == len(states), f"one for each of {len(states)} states")
    require("score", found[:8], not any(map(math.isnan, found)), "numbers that are not NaN")
    return found
