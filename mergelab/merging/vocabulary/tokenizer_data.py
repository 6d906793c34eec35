"""A tokenizer as plain data, read and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mergelab.checkpoints.companions import companion_json, has_companion, read_companion
from mergelab.checkpoints.source import Checkpoint
from mergelab.checkpoints.text_file import MAX_TABLE
from mergelab.errors import CheckpointError, quoted, shortened

__all__ = ["TOKENIZER_FILES", "TokenizerData", "added_token", "read_tokenizer", "vocabulary_differences"]


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""The files of a model folder that make its tokenizer; those with a `tokenizer.json` suffice."""

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


@dataclass(frozen=True)
class TokenizerData:
    """One model's tokenizer, as read from its folder.

    Attributes:
        name: the model's name, for messages.
        folder: where it was read.
        data: `tokenizer.json`.
        kind: the subword model: BPE, Unigram, WordPiece or WordLevel.
        plain: token -> id of the subword model's own vocabulary, in id order.
        added: added tokens (matched in text before the subword model runs) by content, in id order: their
            definition as `tokenizer.json` spells it.
    """

    name: str
    folder: Path
    data: Mapping[str, Any]
    kind: str
    plain: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id of every token, plain and added, in id order."""
        ids = {**self.plain, **{token: int(definition["id"]) for token, definition in self.added.items()}}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, as they are."""
        names = [name for name in TOKENIZER_FILES if has_companion(self.folder, name)]
        return {name: read_companion(self.folder, name, MAX_TABLE) for name in names}


def read_tokenizer(name: str, folder: Path) -> TokenizerData:
    """Reads the tokenizer of the model called `name`.

    Raises:
        CheckpointError: there is no `tokenizer.json`, or it is not one.
    """
    path = folder / "tokenizer.json"
    if not has_companion(folder, path.name):
        raise CheckpointError(_missing(name, folder))
    data = companion_json(folder, path.name, MAX_TABLE)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list):
        raise CheckpointError(
            f"{path} has no 'model.vocab'; expected a tokenizer.json as the tokenizers package writes it"
        )
    kind = str(model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE"))
    if kind not in _KINDS or isinstance(vocab, list) != (kind == "Unigram"):
        raise CheckpointError(
            f"{path} has a {kind!r} model with a {type(vocab).__name__} vocabulary; expected one of "
            f"{', '.join(_KINDS)}, of which only Unigram has a list"
        )
    try:
        plain = {piece[0]: i for i, piece in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        added = {str(a["content"]): a for a in data.get("added_tokens") or ()}
        added |= _only_in_config(folder, {**plain, **added})
        plain = dict(sorted(plain.items(), key=lambda item: _token_id(item[1])))
        added = dict(sorted(added.items(), key=lambda item: _token_id(item[1]["id"])))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a malformed vocabulary or added token ({shortened(str(error), 200)}); expected "
            "token -> id and a list of {id, content, ...}"
        ) from error
    return TokenizerData(name, folder, data, kind, plain, added)


def _token_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{quoted(value)} is not a token id")
    return value


def _only_in_config(folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Added tokens that `tokenizer_config.json` or `added_tokens.json` has and `tokenizer.json` lacks."""
    found: dict[str, dict[str, Any]] = {}
    decoder = companion_json(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    for number, definition in decoder.items():
        found[str(definition["content"])] = added_token(int(number), **definition)
    for token, number in companion_json(folder, "added_tokens.json").items():
        found.setdefault(token, added_token(int(number), token))
    return {token: definition for token, definition in found.items() if token not in known}


def added_token(
    id: int,
    content: str,
    *,
    single_word: bool = False,
    lstrip: bool = False,
    rstrip: bool = False,
    normalized: bool = True,
    special: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """An added token's definition as `tokenizer.json` spells it, other keys dropped."""
    return {
        "id": id,
        "content": content,
        "single_word": single_word,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": normalized,
        "special": special,
    }


def _missing(name: str, folder: Path) -> str:
    vocabulary = next((f for f in TOKENIZER_FILES[6:] if has_companion(folder, f)), None)
    if vocabulary:
        return (
            f"model {name!r} has {vocabulary} but no tokenizer.json in {folder}; convert it once with "
            "`transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)`"
        )
    return (
        f"model {name!r} has no tokenizer.json in {folder}; copy the tokenizer files of the model it was "
        "trained from, or leave `tokenizer` and `tokenizer_source` out of the recipe"
    )


def vocabulary_differences(models: Mapping[str, Checkpoint], base: str | None) -> tuple[str, ...]:
    """One sentence for each model whose tokens or ids differ from the base's (or first model's).

    Models without a `tokenizer.json` are passed over: a merge that keeps the vocabulary needs none.

    Raises:
        CheckpointError: a tokenizer file that is not one.
    """
    vocabularies = {
        name: read_tokenizer(name, checkpoint.path).vocabulary
        for name, checkpoint in models.items()
        if has_companion(checkpoint.path, "tokenizer.json")
    }
    first = base if base in vocabularies else next(iter(vocabularies), None)
    if first is None:
        return ()
    reference = vocabularies[first]
    sentences = []
    for name, vocabulary in vocabularies.items():
        moved = [t for t, number in vocabulary.items() if t in reference and reference[t] != number]
        only = [t for t in vocabulary if t not in reference]
        lost = [t for t in reference if t not in vocabulary]
        found = [
            f"{_count(tokens)} {what} (such as {', '.join(map(repr, islice(tokens, 2)))})"
            for tokens, what in ((moved, "with other ids"), (only, "it lacks"))
            if tokens
        ] + ([f"{_count(lost)} fewer"] if lost else [])
        if found:
            sentences.append(
                f"model {name!r} has, compared with {first!r}, {' and '.join(found)}, so rows of different "
                "tokens would be merged; set tokenizer_source to 'union' or 'base'"
            )
    return tuple(sentences)


def _count(tokens: list[str]) -> str:
    return f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
