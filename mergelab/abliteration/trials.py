"""Trials of a search, the frontier of those that nothing beats, and the one that is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mergelab.errors import MergelabError, SearchError

__all__ = ["CHOICES", "SearchResult", "Trial", "check_choice", "cost_from", "frontier"]


@dataclass(frozen=True)
class Trial:
    """One point of the space and its figures, on prompts that were not used to find directions.

    Attributes:
        parameters: values by name, as `Space` describes them.
        refusal: mean probability that the first token of an answer to a harmful prompt is a refusal token.
        kl: mean KL in nats of the first token of harmless answers, from the unedited model's.
        loss: cross-entropy on the text, nats per token; None without a text.
        borderline: the same as `refusal`, of harmless prompts that tend to be refused; None without any.
        number: place in the search, counted from 1; 0 for what was no trial.
    """

    parameters: Mapping[str, float]
    refusal: float
    kl: float
    loss: float | None
    borderline: float | None = None
    number: int = 0

    @property
    def figures(self) -> tuple[float, ...]:
        """What is to be small."""
        more = (figure for figure in (self.loss, self.borderline) if figure is not None)
        return (self.refusal, self.kl, *more)

    @property
    def refusals(self) -> float:
        """The refusals that are to end: of harmful prompts, and of borderline ones where there are any."""
        return self.refusal + (self.borderline or 0.0)


def cost_from(baseline: Trial, kl_weight: float = 1.0, loss_weight: float = 1.0) -> Callable[[Trial], float]:
    """What a search descends in, given the figures of the unedited model."""

    def cost(trial: Trial) -> float:
        rise = 0.0 if trial.loss is None or baseline.loss is None else trial.loss - baseline.loss
        value = trial.refusals + kl_weight * trial.kl + loss_weight * rise
        return float(value) if np.isfinite(value) else np.inf

    return cost


CHOICES = {
    "lowest-refusals": "the fewest refusals",
    "lowest-kl": "the least KL among those that at least halve the refusals",
    "balanced": "the least sum of refusals, KL and loss",
}
"""How a trial is taken, in words; each among the trials of at most the largest KL that is allowed."""


def check_choice(choice: str | int) -> str | int:
    """The name of a rule, or the number of a trial, as given by a person.

    Raises:
        MergelabError: it is neither.
    """
    if choice in CHOICES or (isinstance(choice, int) and choice >= 1):
        return choice
    if isinstance(choice, str) and choice.isascii() and choice.isdigit() and 0 < len(choice) < 10:
        return check_choice(int(choice))
    raise MergelabError(
        f"{str(choice)[:40]!r} chooses no trial; give {', '.join(CHOICES)}, or the number of a trial, the "
        "first being 1."
    )


@dataclass(frozen=True)
class SearchResult:
    """Every trial in order, the first being the starting point.

    Attributes:
        trials: the trials.
        frontier: those that no other beats in every figure, by refusal.
        baseline: the figures of the unedited model: refusal, KL (0), loss and borderline refusals.
    """

    trials: tuple[Trial, ...]
    frontier: tuple[Trial, ...]
    baseline: Trial

    def best(self, max_kl: float) -> Trial:
        """The trial that refuses least among those of at most `max_kl`.

        Raises:
            SearchError: none moves harmless answers so little; `trace` holds them all.
        """
        return self.choose("lowest-refusals", max_kl)

    def choose(self, choice: str | int, max_kl: float) -> Trial:
        """The trial of a number, or the one that a rule of `CHOICES` takes.

        Args:
            choice: number of a trial, the first being 1; or the name of a rule.
            max_kl: the most nats that harmless answers may move; a number is not held to it.

        Raises:
            MergelabError: there is no such trial or rule.
            SearchError: no trial is within `max_kl`, or for `lowest-kl` none of those halves the refusals;
                the message says how many failed what, and `trace` holds them all.
        """
        choice = check_choice(choice)
        if isinstance(choice, int):
            if choice > len(self.trials):
                raise MergelabError(
                    f"trial {choice} was asked for, but the search made {len(self.trials)}; give a number up "
                    f"to that, such as one of the frontier: {_numbers(self.frontier)}."
                )
            return self.trials[choice - 1]
        passing = [trial for trial in self.trials if trial.kl <= max_kl and np.isfinite(trial.figures).all()]
        if not passing:
            raise self._failed(max_kl)
        if choice == "lowest-refusals":
            return min(passing, key=lambda trial: (trial.refusals, trial.kl))
        if choice == "balanced":
            return min(passing, key=cost_from(self.baseline))
        halving = [trial for trial in passing if 2 * trial.refusals <= self.baseline.refusals]
        if not halving:
            least = min(trial.refusals for trial in passing)
            raise SearchError(
                f"none of {len(passing)} trials within the KL of {max_kl:g} halves the refusals (from "
                f"{self.baseline.refusals:.3g}; the least is {least:.3g}); choose lowest-refusals, search "
                "longer, or allow more KL.",
                self._trace(max_kl),
            )
        return min(halving, key=lambda trial: (trial.kl, trial.refusals))

    def _failed(self, max_kl: float) -> SearchError:
        failed = self.failures(max_kl)
        counts = ", ".join(f"{count} have {what}" for what, count in failed.items() if count)
        finite = [trial for trial in self.trials if np.isfinite(trial.kl)]
        nearest = ""
        if finite:
            least = min(finite, key=lambda trial: trial.kl)
            nearest = f"; the least KL is {least.kl:.3g}, of trial {least.number} with refusals of "
            nearest += f"{least.refusals:.3g}"
        return SearchError(
            f"no trial has a KL of at most {max_kl:g} (of {len(self.trials)} trials {counts}{nearest}); "
            "search longer, allow more, or take one by its number.",
            self._trace(max_kl),
        )

    def failures(self, max_kl: float) -> dict[str, int]:
        """How many trials fail each filter."""
        finite = [bool(np.isfinite(trial.figures).all()) for trial in self.trials]
        over = [good and trial.kl > max_kl for good, trial in zip(finite, self.trials, strict=True)]
        return {f"a KL above {max_kl:g}": sum(over), "a figure that is not finite": finite.count(False)}

    def _trace(self, max_kl: float) -> dict[str, object]:
        return {"max_kl": max_kl, "failed": self.failures(max_kl), **self.to_json()}

    def to_json(self) -> dict[str, Any]:
        """All trials as plain data, and of the frontier the whole trials again, by refusal."""
        return {
            "baseline": asdict(self.baseline),
            "frontier": [asdict(trial) for trial in self.frontier],
            "trials": [asdict(trial) for trial in self.trials],
        }


def _numbers(trials: Sequence[Trial]) -> str:
    return ", ".join(str(trial.number) for trial in trials[:8]) + (", ..." if len(trials) > 8 else "")


def frontier(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The trials that no other equals or beats in every figure while beating it in one, by refusal."""
    trials = tuple(trial for trial in trials if np.isfinite(trial.figures).all())
    if not trials:
        return ()
    figures = np.array([trial.figures for trial in trials])
    no_worse = (figures[:, None] <= figures[None]).all(-1)
    better = (figures[:, None] < figures[None]).any(-1)
    beaten = np.flatnonzero((no_worse & better).any(axis=0)).tolist()
    kept = (trial for n, trial in enumerate(trials) if n not in beaten)
    return tuple(sorted(kept, key=lambda trial: trial.refusal))
