"""What is wrong with merging models whose vocabularies differ, when a recipe does not say how."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from mergelab.checkpoints.source import Checkpoint
from mergelab.merging.vocabulary.tokenizer_files import read_tokenizer

__all__ = ["vocabulary_differences"]


def vocabulary_differences(models: Mapping[str, Checkpoint], base: str | None) -> tuple[str, ...]:
    """One sentence for each model whose tokens or ids differ from the base's (or first model's).

    Models without a `tokenizer.json` are passed over: a merge that keeps the vocabulary needs none.

    Raises:
        CheckpointError: a tokenizer file that is not one.
    """
    vocabularies = {
        name: read_tokenizer(name, checkpoint.path).vocabulary
        for name, checkpoint in models.items()
        if (checkpoint.path / "tokenizer.json").is_file()
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
