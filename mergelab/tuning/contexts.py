"""Text as rows of tokens: what is judged, and what is learned, in an order that the step alone decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.errors import TuningError
from mergelab.models.model import Model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.text.contexts import TextContexts, text_contexts
from mergelab.text.corpus import Document, TextOptions, corpus_places, documents, documents_of_texts
from mergelab.text.corpus_files import CorpusFile
from mergelab.text.kept_contexts import corpus_contexts
from mergelab.text.tokenizer import Tokenizer
from mergelab.tuning.settings import TuningSettings

__all__ = ["Rows", "Text", "batch_of", "read_rows", "steps_of"]

Text = str | Path | np.ndarray | Sequence[Any]
"""A text; places of texts as `Path`s; texts or conversations; or rows of token ids `[contexts, length]`."""

_CONTEXT = 512
"""Tokens in a context, where nothing says how many."""

_LOOKED_AT = 64
"""Documents by which it is told whether a text is of conversations."""


@dataclass(frozen=True)
class Rows:
    """Contexts of one length.

    Attributes:
        tokens: int32 `[contexts, length]`.
        counted: bool `[contexts, length]`, the tokens that are to be predicted; None for all.
        roles: what of conversations counts.
    """

    tokens: np.ndarray
    counted: np.ndarray | None = None
    roles: str = "all"

    def take(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some contexts, and which of those behind the first of each count."""
        tokens = np.asarray(self.tokens[index], np.int32)
        if self.counted is None:
            return tokens, np.ones((*tokens.shape[:-1], tokens.shape[-1] - 1), bool)
        return tokens, np.asarray(self.counted[index], bool)[..., 1:]

    def part(self, chosen: slice) -> Rows:
        """Some of the contexts."""
        counted = None if self.counted is None else self.counted[chosen]
        return Rows(self.tokens[chosen], counted, self.roles)

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted and count."""
        return int(self.take(slice(None))[1].sum())


def read_rows(
    model: Model,
    tokenizer: Tokenizer | None,
    text: Text,
    held_out: Text | None,
    settings: TuningSettings,
    *,
    folder: Path | None = None,
    reading: Callable[[int], object] = lambda tokens: None,
) -> tuple[Rows, Rows | None]:
    """The contexts that are learned, and those that are judged.

    Args:
        model: what is trained.
        tokenizer: its tokenizer; None where rows of ids are given.
        text: what is learned.
        held_out: what is judged; by default the last contexts of the text, which are then not learned.
        settings: length of contexts, roles, and how much is held out and read.
        folder: folder in which the tokens of places are kept, for a call that goes on after a kill.
        reading: function that is called with the tokens read so far.

    Returns:
        The second is None where nothing is held out.

    Raises:
        CorpusError: a text cannot be read, or does not fill one context.
        TuningError: there is one context alone, from which none can be held out.
        TokenError: a context is longer than the positions, or a token is beyond the vocabulary.
    """
    length = window_length(model, settings.context, _CONTEXT)
    if isinstance(text, np.ndarray):
        length = text.shape[-1]

    def read(given: Text, tokens: int | None, home: Path | None) -> Rows:
        def check(ids: np.ndarray) -> None:
            check_tokens(model, ids, place="the text")

        if isinstance(given, np.ndarray):
            return Rows(_checked_rows(model, given, length))
        if tokenizer is None:
            raise TuningError("texts need the model's tokenizer; give it, or rows of token ids.")
        roles = _roles(given, settings)
        options = TextOptions(roles="assistant" if roles == "assistant" else "all", tokens=tokens)
        found: TextContexts
        if places := _places(given):
            found = corpus_contexts(
                tokenizer, places, length, options, folder=home, check=check, progress=reading
            )
        else:
            found = text_contexts(
                tokenizer, _in_memory(_listed(given)), length, options, check=check, progress=reading
            )
        return Rows(found.tokens, found.counted, roles)

    share = settings.held_out_share if held_out is None else 0.0
    limit = None
    if settings.tokens is not None:  # of a large corpus no more is read than is trained on and judged
        contexts = -(-settings.tokens // length)
        limit = length * (contexts + max(1, round(contexts * share / (1 - share))) if share else contexts)
    rows = read(text, limit, None if folder is None else folder / "learned")
    if held_out is not None:
        return rows, read(held_out, None, None if folder is None else folder / "judged")
    if not share:
        return rows, None
    count = len(rows.tokens)
    if count < 2:
        raise TuningError(
            f"the text fills one context of {length} tokens, which cannot be learned and held out; give more "
            "text or shorter contexts, a text of its own to judge on (held_out), or hold nothing out."
        )
    judged = min(max(1, round(count * share)), count - 1)
    return rows.part(slice(count - judged)), rows.part(slice(count - judged, None))


def _checked_rows(model: Model, rows: np.ndarray, length: int) -> np.ndarray:
    if (
        rows.ndim != 2
        or rows.dtype.kind not in "iu"
        or not rows.size
        or rows.shape[1] != length
        or length < 2
    ):
        raise TuningError(
            f"the rows are {rows.dtype} of shape {list(rows.shape)}; expected ids [contexts, length], "
            "at least one context, all of one length of at least 2."
        )
    check_tokens(model, rows, place="the rows")
    return rows.astype(np.int32)


def _places(given: Text) -> list[CorpusFile]:
    if isinstance(given, Path):
        return corpus_places(given)
    if isinstance(given, str) or not len(given):
        return []
    are_places = all(isinstance(one, Path | CorpusFile) for one in given)
    return corpus_places([*given]) if are_places else []


def _listed(given: Text) -> str | Sequence[Any]:
    """What is no place: a text, or several."""
    assert not isinstance(given, Path | np.ndarray)
    return given


def _in_memory(given: str | Sequence[Any]) -> Iterator[Document]:
    for number, one in enumerate([given] if isinstance(given, str) else given, 1):
        if isinstance(one, str):
            yield from documents_of_texts(one)
        elif _is_conversation(one):
            yield Document(f"conversation {number}", messages=one)
        else:
            raise TuningError(
                f"text {number} is {type(one).__name__}; expected a text, or a conversation as a list of "
                "{'role': ..., 'content': ...}."
            )


def _is_conversation(one: Any) -> bool:
    return (
        isinstance(one, Sequence)
        and bool(one)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in one)
    )


def _roles(given: Text, settings: TuningSettings) -> str:
    """What of conversations counts: what is asked for, or assistants' turns where all are conversations."""
    if settings.roles != "auto":
        return settings.roles
    places = _places(given)
    read = documents(places) if places else _in_memory(_listed(given))
    first = list(islice(read, _LOOKED_AT))
    return "assistant" if first and all(one.messages is not None for one in first) else "all"


def steps_of(rows: Rows, settings: TuningSettings) -> int:
    """Number of steps, at least one: as many as the tokens that are asked for, or the epochs, need."""
    per_step = settings.batch * settings.accumulate
    contexts = len(rows.tokens)
    if settings.tokens is not None:
        return max(1, -(-settings.tokens // (per_step * rows.tokens.shape[1])))
    return max(1, round(settings.epochs * contexts / per_step))


def batch_of(rows: Rows, step: int, settings: TuningSettings) -> tuple[np.ndarray, np.ndarray]:
    """The contexts of step number `step`, from 0 on: each epoch has an order of its own, drawn by the seed.

    Returns:
        Tokens int32 `[accumulate, batch, length]`, and targets that count, bool `[accumulate, batch,
        length - 1]`.
    """
    per_step, count = settings.batch * settings.accumulate, len(rows.tokens)
    numbers = np.arange(step * per_step, (step + 1) * per_step)
    chosen = np.array([_order(settings.seed, int(n) // count, count)[int(n) % count] for n in numbers])
    tokens, counted = rows.take(chosen)
    shape = (settings.accumulate, settings.batch, -1)
    return tokens.reshape(shape), counted.reshape(shape)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
