"""What a check of a recipe says: one thing that may make its merge meaningless."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_SUM", "MOST_TIMES", "Finding"]

MOST_SUM = 1.5
"""Sum of weights from which sums of task vectors overshoot."""
MOST_TIMES = 5.0
"""How many times as much as the others one may have changed."""


@dataclass(frozen=True)
class Finding:
    """One thing that may make a merge meaningless.

    Attributes:
        kind: `refused`, `origin`, `base`, `distance`, `outlier`, `equal`, `nonfinite`, `vocabulary`, `rows`,
            `config`, `chat_template`, `strength`, `density`, `weight`, `quantized` or `plan`.
        sentence: What was found.
        remedy: What to do about it; empty where the sentence says it.
        models: Models that it is about.
    """

    kind: str
    sentence: str
    remedy: str = ""
    models: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.sentence}: {self.remedy}" if self.remedy else self.sentence
