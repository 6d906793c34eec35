"""The tokenizer of a merged model: its tokens, ids and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.checkpoints.json_data import parse_json_object
from mergelab.errors import CheckpointError
from mergelab.merging.vocabulary.tokenizer_data import TokenizerData, added_token

__all__ = ["Additions", "json_bytes", "token_ids", "tokenizer_files", "union"]


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

    donor: TokenizerData
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


def union(donor: TokenizerData, others: Iterable[TokenizerData]) -> Additions:
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


def _scores(tokenizer: TokenizerData) -> dict[str, float]:
    if tokenizer.kind != "Unigram":
        return {}
    return {piece: float(score) for piece, score in tokenizer.data["model"]["vocab"]}


def _kind_warnings(donor: TokenizerData, other: TokenizerData, unreachable: list[str]) -> list[str]:
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


_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def json_bytes(data: Any) -> bytes:
    """`data` as the indented UTF-8 JSON of model folders."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def tokenizer_files(additions: Additions) -> dict[str, bytes]:
    """Files by name: the donor's bytes if nothing is added, else its JSON files with the new tokens.

    The files of slow tokenizers (`tokenizer.model`, `vocab.json`, ...) cannot take new tokens; they are left
    out of an extended tokenizer rather than left wrong.

    Raises:
        CheckpointError: a Unigram donor whose ids have gaps, which its list of pieces cannot express.
    """
    files = additions.donor.files()
    if not additions.plain and not additions.added:
        return files
    kept = {name: raw for name, raw in files.items() if name in _KEPT}
    added = {**additions.donor.added, **additions.added}
    kept["tokenizer.json"] = json_bytes(_tokenizer_json(additions, added))
    if "tokenizer_config.json" in kept:
        place = f"{additions.donor.folder}/tokenizer_config.json"
        config = parse_json_object(kept["tokenizer_config.json"], place)
        decoder = config.get("added_tokens_decoder")
        if decoder is not None:
            for definition in additions.added.values():
                flags = {key: value for key, value in definition.items() if key != "id"}
                decoder[str(definition["id"])] = flags
            kept["tokenizer_config.json"] = json_bytes(config)
    return kept


def _tokenizer_json(additions: Additions, added: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`tokenizer.json` as plain data, added tokens in id order."""
    donor = additions.donor
    model = dict(donor.data["model"])
    ids = {token: int(definition["id"]) for token, definition in added.items()}
    if additions.plain:
        # On loading, an added token takes the next free id unless the subword model knows it: with plain
        # tokens behind it, only its own entry there keeps its id.
        plain = {**donor.plain, **{token: number for token, (number, _) in additions.plain.items()}, **ids}
        plain = dict(sorted(plain.items(), key=lambda item: item[1]))
        model["vocab"] = plain if donor.kind != "Unigram" else _pieces(additions, plain)
    in_order = sorted(added.values(), key=lambda definition: int(definition["id"]))
    return {**donor.data, "added_tokens": in_order, "model": model}


def _pieces(additions: Additions, plain: Mapping[str, int]) -> list[list[Any]]:
    """A Unigram model's pieces with their log-probabilities; a piece's place is its id."""
    scores = {piece: float(score) for piece, score in additions.donor.data["model"]["vocab"]}
    least = min(scores.values(), default=0.0)
    for token, (_, score) in additions.plain.items():
        scores[token] = least if score is None else score
    if list(plain.values()) != list(range(len(plain))):
        raise CheckpointError(
            f"the Unigram tokenizer of {additions.donor.name!r} leaves ids unused, so no tokens can be added "
            "to it; set tokenizer_source to 'base' or to one model"
        )
    return [[token, scores.get(token, least)] for token in plain]


def token_ids(
    config: Mapping[str, Any],
    tokenizer: TokenizerData,
    donor_config: Mapping[str, Any],
    output: Mapping[str, int],
) -> dict[str, int | list[int] | None]:
    """Returns the `*_token_id` keys of the merged config that differ from `config`.

    The donor's ids are ids of the merged vocabulary; a key only `config` has is carried over by its token's
    spelling, and becomes None if the merged vocabulary has no such token.

    Args:
        config: the config the merge starts from.
        tokenizer: the tokenizer that `config` speaks of.
        donor_config: the config of the model that gives the ids.
        output: the merged vocabulary.
    """
    spelling = {number: token for token, number in tokenizer.vocabulary.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [new for new in map(moved, value) if new is not None]
        return output.get(spelling.get(value, "")) if isinstance(value, int) else value

    updates = {key: value for key, value in donor_config.items() if key.endswith("_token_id")}
    for key, value in config.items():
        if key.endswith("_token_id") and key not in donor_config:
            updates[key] = moved(value)
    return {key: value for key, value in updates.items() if key not in config or config[key] != value}
