"""The record of a greedy soup: every candidate's scores, every decision, and the separate test scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mergelab.checkpoints.json_data import parse_json_object
from mergelab.errors import CheckpointError, OutputError
from mergelab.merging.soups.scores import Scores

__all__ = ["Decision", "Ranked", "SoupTrace"]

_FORMAT = 1


@dataclass(frozen=True)
class Ranked:
    """A candidate and its own validation scores."""

    name: str
    scores: Scores


@dataclass(frozen=True)
class Decision:
    """One candidate considered for the soup.

    Attributes:
        candidate: its name.
        before: validation scores of the soup so far.
        after: validation scores of the soup with it; None if the search had stopped and it was not tried.
        accepted: whether it entered the soup.
        reason: why, in words.
    """

    candidate: str
    before: Scores
    after: Scores | None
    accepted: bool
    reason: str


@dataclass(frozen=True)
class SoupTrace:
    """Everything a greedy search saw and decided; enough to rebuild the soup from the candidates.

    Attributes:
        settings: the selection rule, acceptance rule and limits, as plain data.
        ranking: all candidates, best on validation first.
        decisions: one per candidate after the first, in order.
        test: scores on the test evaluator, by what was tested (`soup`, `best_single`, `uniform`,
            `ensemble`); empty if no test evaluator was given. Never read by the search.
    """

    settings: Mapping[str, Any]
    ranking: tuple[Ranked, ...]
    decisions: tuple[Decision, ...]
    test: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        """The soup's ingredients in the order they were added; the soup is their equal-weight mean."""
        return (self.ranking[0].name, *(d.candidate for d in self.decisions if d.accepted))

    @property
    def validation(self) -> Scores:
        """The soup's validation scores."""
        kept = [d.after for d in self.decisions if d.accepted and d.after is not None]
        return kept[-1] if kept else self.ranking[0].scores

    def with_test(self, test: Mapping[str, Scores]) -> SoupTrace:
        """Returns the trace with test scores added."""
        return replace(self, test=dict(test))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, with the derived `members` and `validation` for readers of the file."""
        body = asdict(self)
        return {"format": _FORMAT, "members": list(self.members), "validation": self.validation, **body}

    @classmethod
    def from_json(cls, text: str) -> SoupTrace:
        """Returns the trace that was written as this JSON text.

        Raises:
            OutputError: the text is not a trace of this format.
        """
        try:
            data = parse_json_object(text.encode(), "the trace")
            if data["format"] != _FORMAT:
                raise ValueError(f"its format is {data['format']!r}, expected {_FORMAT}")
            return cls(
                settings=data["settings"],
                ranking=tuple(Ranked(**r) for r in data["ranking"]),
                decisions=tuple(Decision(**d) for d in data["decisions"]),
                test=data["test"],
            )
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"This is not the trace of a greedy soup ({error}); make it again.") from error
