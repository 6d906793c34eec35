"""Which tokens a merged model has: the donor's with their ids, then what the other models add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.merging.vocabulary.tokenizer_files import Tokenizer, added_token

__all__ = ["Additions", "union"]


@dataclass
class Additions:
    """A donor's vocabulary and the tokens added to it.

    Attributes:
        donor: the tokenizer that is extended.
        plain: new tokens of the subword models' vocabularies: id, and the log-probability a Unigram model
            gives it (None for the other kinds).
        added: added tokens by content, with their definition; also tokens that the donor has as plain ones
            and another model matches before its subword model runs.
        warnings: what a reader of the recipe should know.
        vocabulary: token -> id of the extended vocabulary, the donor's first.
    """

    donor: Tokenizer
    plain: dict[str, tuple[int, float | None]] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    vocabulary: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.vocabulary = dict(self.donor.vocabulary)
        # Not the count: ids may have gaps, and a count would then be taken already.
        self._next_id = max(self.vocabulary.values(), default=-1) + 1

    def add_plain(self, token: str, score: float | None) -> None:
        """Adds `token` to the subword model's vocabulary."""
        self.plain[token] = (self._number(token), score)

    def add_token(self, token: str, definition: Mapping[str, Any] | None) -> int:
        """Makes `token` an added token, defined as elsewhere or as a plain word; returns its id."""
        number = self._number(token)
        self.added[token] = added_token(number, token) if definition is None else {**definition, "id": number}
        return number

    def _number(self, token: str) -> int:
        if token not in self.vocabulary:
            self.vocabulary[token] = self._next_id
            self._next_id += 1
        return self.vocabulary[token]


def union(donor: Tokenizer, others: Iterable[Tokenizer]) -> Additions:
    """Adds to the donor's vocabulary every token of the others, model by model, each in the order of its ids.

    The donor keeps its BPE merges, so its text is segmented exactly as before; a plain token that is new to a
    BPE donor has a row but no merges that produce it.
    """
    result = Additions(donor)
    owner = dict.fromkeys(donor.added, donor)
    for other in others:
        scores = _scores(other)
        unreachable = []
        for token in other.vocabulary:
            definition = other.added.get(token)
            if definition is None:
                if token not in result.vocabulary:
                    result.add_plain(token, scores.get(token))
                    unreachable.append(token)
            elif token not in owner:
                owner[token] = other
                result.add_token(token, definition)
            elif _differs(owner[token].added[token], definition):
                result.warnings.append(
                    f"added token {token!r} is defined differently by {owner[token].name!r} and "
                    f"{other.name!r}; the definition of {owner[token].name!r} is kept"
                )
        result.warnings += _kind_warnings(donor, other, unreachable)
    return result


def _differs(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return {**left, "id": 0} != {**right, "id": 0}


def _scores(tokenizer: Tokenizer) -> dict[str, float]:
    if tokenizer.kind != "Unigram":
        return {}
    return {piece: float(score) for piece, score in tokenizer.data["model"]["vocab"]}


def _kind_warnings(donor: Tokenizer, other: Tokenizer, unreachable: list[str]) -> list[str]:
    warnings = []
    if donor.kind != other.kind:
        warnings.append(
            f"{donor.name!r} has a {donor.kind} tokenizer and {other.name!r} a {other.kind} one; their "
            "tokens are matched by spelling alone, which may not mean the same text"
        )
    if unreachable and donor.kind == "BPE":
        warnings.append(
            f"new tokens of {other.name!r} get rows but are never produced from text, as the BPE merges are "
            f"those of {donor.name!r}: {len(unreachable)} in all, such as {unreachable[0]!r}"
        )
    return warnings
