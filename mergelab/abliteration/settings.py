"""How directions are found, chosen and removed, as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mergelab.abliteration.answers import REFUSAL_PHRASES
from mergelab.abliteration.direction_selection import Filters
from mergelab.abliteration.removal import KeepNorms

__all__ = ["AbliterationSettings", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class AbliterationSettings:
    """How directions are found, chosen and removed.

    Attributes:
        phrases: Beginnings of answers that count as refusals; their first tokens begin refusals.
        system: System turn before every prompt, or None.
        positions: Number of last tokens to look at; those that the chat template puts after the instruction
            if None.
        winsorize: Quantile of magnitudes to clip activations to, as in `find_directions`; None clips nothing.
        orthogonal: Whether directions are first made orthogonal to the mean of the harmless prompts, so that
            the model keeps this component.
        filters: Conditions that a direction must satisfy; `max_kl` holds for the trial of a search too.
        keep_norms: Norms that the matrices keep.
        trials: Trials of a search (`search_ablation`); with 0 the direction is removed everywhere.
        choose: Trial that is written: a rule of `CHOICES` (`lowest-refusals`, `lowest-kl`, `balanced`), or
            the number of a trial.
        rounds: Rounds of that search.
        max_new_tokens: Length of each answer that is looked through for phrases.
        batch: Prompts in one forward pass.
        text_length: Tokens in a window of the text whose loss is measured; 256, or as many as the model has
            positions, if None.
        seed: Seed of the prompts' order and the trials.
        response_prefix: Text that every answer begins with, such as `<think>` of a reasoning model; scores
            and answers are of what follows it. If None it is looked for (`shared_opening`).
        anyway: Whether directions are searched for although harmful prompts score no higher than harmless
            ones, so that the model does not seem to refuse.
    """

    phrases: str | Sequence[str] = REFUSAL_PHRASES
    system: str | None = None
    positions: int | None = None
    winsorize: float | None = None
    orthogonal: bool = False
    filters: Filters = field(default_factory=Filters)
    keep_norms: KeepNorms = None
    trials: int = 0
    choose: str | int = "lowest-refusals"
    rounds: int = 4
    max_new_tokens: int = 48
    batch: int = 16
    text_length: int | None = None
    seed: int = 0
    response_prefix: str | None = None
    anyway: bool = False
