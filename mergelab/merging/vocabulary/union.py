"""Which tokens a merged model has: the donor's with their ids, then what the other models add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.merging.vocabulary.tokenizer_files import Tokenizer, added_token

__all__ = ["Additions", "union"]


@dataclass
class Additions:
    """Tokens to add to a donor's vocabulary.

    Attributes:
        donor: the tokenizer that is extended.
        plain: new tokens of the subword models' vocabularies: id, and the log-probability a Unigram model
            gives it (None for the other kinds).
        added: added tokens by content, with their definition; also tokens that the donor has as plain ones
            and another model matches before its subword model runs.
        warnings: what a reader of the recipe should know.
    """

    donor: Tokenizer
    plain: dict[str, tuple[int, float | None]]
    added: dict[str, dict[str, Any]]
    warnings: list[str]

    @classmethod
    def none(cls, donor: Tokenizer) -> Additions:
        return cls(donor, {}, {}, [])

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id of the extended vocabulary, the donor's first."""
        plain = {token: number for token, (number, _) in self.plain.items()}
        return {**self.donor.vocabulary, **plain, **{t: int(d["id"]) for t, d in self.added.items()}}

    def next_id(self) -> int:
        # Not the count: ids may have gaps, and a count would then be taken already.
        return max(self.vocabulary.values(), default=-1) + 1

    def add_token(self, token: str, definition: Mapping[str, Any] | None) -> int:
        """Adds `token` as an added token, defined as elsewhere or as a plain word; returns its id."""
        number = self.next_id()
        self.added[token] = added_token(number, token) if definition is None else {**definition, "id": number}
        return number


def union(donor: Tokenizer, others: Iterable[Tokenizer]) -> Additions:
    """Adds to the donor's vocabulary every token of the others, model by model, each in the order of its ids.

    The donor keeps its BPE merges, so its text is segmented exactly as before; a plain token that is new to a
    BPE donor has a row but no merges that produce it.
    """
    result = Additions.none(donor)
    known = donor.vocabulary
    number = result.next_id()
    owner = dict.fromkeys(donor.added, donor)
    for other in others:
        scores = _scores(other)
        unreachable = []
        for token in other.vocabulary:
            definition = other.added.get(token)
            if token not in known:
                known[token] = number
                if definition is None:
                    result.plain[token] = (number, scores.get(token))
                    unreachable.append(token)
                number += 1
            if definition is None:
                continue
            if token not in owner:
                owner[token] = other
                result.added[token] = {**definition, "id": known[token]}
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
