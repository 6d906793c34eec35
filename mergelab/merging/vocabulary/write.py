"""The files of an extended tokenizer: the donor's, with the new tokens written into them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergelab.checkpoints.json_data import parse_json_object
from mergelab.errors import CheckpointError
from mergelab.merging.vocabulary.union import Additions

__all__ = ["json_bytes", "tokenizer_files"]

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
