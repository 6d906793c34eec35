"""Held-out text in units that are resampled, and what a model says of each: nats, hits, bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.losses import scores_of_windows
from mergelab.errors import EvaluationError
from mergelab.models.model import Model, Params
from mergelab.models.streamed import StreamedParams
from mergelab.text.corpus import Document, TextOptions, documents, documents_of_texts, sections
from mergelab.text.corpus_files import corpus_files
from mergelab.text.corpus_tokens import bos_of
from mergelab.text.tokenizer import Tokenizer

__all__ = ["HeldOutText", "TextScores", "read_held_out", "score_text"]

_FEWEST = 20
"""Documents from which on they are the units; fewer are cut into passages."""
_PASSAGE, _SHORTEST, _PASSAGES = 1000, 80, 64
"""Characters of a passage at most and at least, and how many there are to be of a short text."""
_GROUP = 32
"""Batches of windows that are held at once."""


@dataclass(frozen=True)
class HeldOutText:
    """Texts that no model was trained on, and the units by which they are resampled.

    Attributes:
        texts: documents; a long one comes in sections of at most 131,072 characters, each read by itself.
        cuts: first characters of the units of each document, from 0 on.
        by: what a unit is: a `document`, or a `passage` of one where there are fewer than 20 documents.
    """

    texts: tuple[str, ...]
    cuts: tuple[tuple[int, ...], ...]
    by: str

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(map(len, self.cuts))

    @property
    def bytes(self) -> int:
        """Bytes of the texts as UTF-8."""
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)


@dataclass(frozen=True)
class TextScores:
    """What a model says of each unit: float64 `[units]` each.

    Attributes:
        nats: sum of the cross-entropies of the tokens that count.
        hits: tokens that were the most probable ones.
        tokens: tokens that count.
        bytes: bytes of text that they spell.
        context: tokens of a window.
    """

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    context: int

    @property
    def bits(self) -> np.ndarray:
        """The cross-entropies in bits."""
        return self.nats / math.log(2)


def read_held_out(
    text: str | Path | Sequence[str | Path], *, field: str | None = None, most: int | None = None
) -> HeldOutText:
    """Texts from strings, or from files: `Path`s of files, globs and folders, and data sets on the hub.

    Of JSON lines, parquet and arrow files each record is a document; any other file is one.

    Args:
        text: strings that are texts, and `Path`s; or one.
        field: field of records that is read; by default `text`.
        most: bytes of text after which no document is begun; all are read if None.

    Raises:
        EvaluationError: the texts are empty, or a record is a conversation.
        CorpusError: a file cannot be read, or a record lacks the field.
    """
    given = [text] if isinstance(text, str | Path) else list(text)
    found: list[str] = []
    size = 0
    for document in sections(_documents(given, field)):
        if most is not None and size >= most:
            break
        if document.messages is not None:
            raise EvaluationError(
                f"{document.place} is a conversation, which each model puts into another text; give plain "
                "text, or name the field that holds it (field)"
            )
        piece = "".join(document.pieces)
        if piece.strip():
            found.append(piece)
            size += len(piece.encode("utf-8", "surrogatepass"))
    if not found:
        names = ", ".join(str(one) for one in given if isinstance(one, Path)) or "the text"
        raise EvaluationError(f"{names}: there is no text in it to evaluate on; give a file with some")
    if len(found) >= _FEWEST:
        return HeldOutText(tuple(found), ((0,),) * len(found), "document")
    length = min(_PASSAGE, max(_SHORTEST, sum(map(len, found)) // _PASSAGES))
    return HeldOutText(tuple(found), tuple(_passages(one, length) for one in found), "passage")


def _documents(given: Sequence[str | Path], field: str | None) -> Iterator[Document]:
    options = TextOptions(field=field)
    for one in given:
        if isinstance(one, Path):
            yield from documents(corpus_files(one), options)
        else:
            yield from documents_of_texts(one)


def _passages(text: str, length: int) -> tuple[int, ...]:
    """Where passages of about a length begin: behind a line, else a word."""
    cuts = [0]
    while len(text) - cuts[-1] >= 2 * length:
        begin, end = cuts[-1] + length // 2, cuts[-1] + length
        found = next((at + 1 for sign in ("\n", " ") if (at := text.rfind(sign, begin, end)) >= 0), end)
        cuts.append(found)
    return tuple(cuts)


@dataclass(frozen=True)
class _Window:
    """Tokens in one context, the first of them context only.

    Attributes:
        ids: int `[inputs + 1]`.
        first: column of the first target.
        units: unit of each target.
    """

    ids: np.ndarray
    first: int
    units: np.ndarray


def score_text(
    model: Model, params: Params, tokenizer: Tokenizer, held: HeldOutText, *, context: int, batch: int = 8
) -> TextScores:
    """A model's scores on each unit of a text.

    A document longer than a context is cut, and each of its tokens counts once, after what stands before it
    in its context: at least one token, or the token that begins texts, where the tokenizer puts one there.
    Without that one, the first token of a document has nothing before it, and counts neither as loss nor as
    bytes.

    Args:
        model: a decoder.
        params: its parameters, on any mesh, or streamed.
        tokenizer: its tokenizer.
        held: the texts.
        context: tokens of a window, at least 2.
        batch: windows in one forward pass.

    Raises:
        TokenError: ids beyond the vocabulary, or windows longer than the model's learned positions.
        EvaluationError: no token counts.
    """
    nats, hits, tokens, size = (np.zeros(held.units) for _ in range(4))
    windows = _windows(tokenizer, held, context, tokens, size)
    # Streamed weights are read once for each group: all windows are one.
    together = None if isinstance(params, StreamedParams) else _GROUP * batch
    while group := list(islice(windows, together)):
        lengths, given = list(_by_length(group, context)), []
        for some in lengths:
            rows = np.zeros((len(some), _room(some[0], context) + 1), np.int32)
            counted = np.zeros((len(some), rows.shape[1] - 1), bool)
            for row, flags, window in zip(rows, counted, some, strict=True):
                row[: len(window.ids)] = window.ids
                flags[window.first - 1 : len(window.ids) - 1] = True
            given.append((rows, counted))
        scores = scores_of_windows(model, params, given, batch=batch)
        for some, (_, counted), (losses, right) in zip(lengths, given, scores, strict=True):
            units = np.concatenate([window.units for window in some])
            np.add.at(nats, units, losses[counted].astype(np.float64))
            np.add.at(hits, units, right[counted].astype(np.float64))
    if not tokens.any():
        raise EvaluationError(
            f"{tokenizer.folder}: no token of the text has another one before it, so none can be predicted; "
            "give more text"
        )
    return TextScores(nats, hits, tokens, size, context)


def _windows(
    tokenizer: Tokenizer, held: HeldOutText, context: int, tokens: np.ndarray, size: np.ndarray
) -> Iterator[_Window]:
    """All windows, in order; adds the tokens that count, and their bytes, to those of the units."""
    begin = bos_of(tokenizer)
    before = [] if begin is None else [begin]
    unit = 0
    for text, cuts in zip(held.texts, held.cuts, strict=True):
        ids, units, spelled = _tokens(tokenizer, text, cuts)
        units += unit
        unit += len(cuts)
        start = 1 - len(before)  # the first target
        np.add.at(tokens, units[start:], 1.0)
        np.add.at(size, units[start:], spelled[start:])
        while start < len(ids):
            known = min(1, start)
            stop = min(len(ids), start + context + 1 - len(before) - known)
            row = np.array([*before, *ids[start - known : stop]], np.int32)
            yield _Window(row, len(before) + known, units[start:stop])
            start = stop


def _tokens(
    tokenizer: Tokenizer, text: str, cuts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of a text, the unit in which each begins, and the bytes of text that it adds."""
    encoding: Any = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.int64)
    # What stands between two tokens belongs to the second; tokens of one character share its place.
    ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64).reshape(-1))
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ids)]
    if len(ids):
        ends[-1] = len(text)
    signs = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (signs > 0x7F).astype(np.int64) + (signs > 0x7FF) + (signs > 0xFFFF)
    at = np.concatenate([[0], np.cumsum(widths)])
    spelled = (at[ends] - at[starts]).astype(np.float64)
    _share_first(encoding, spelled)
    return ids, np.searchsorted(cuts, starts, side="right") - 1, spelled


def _share_first(encoding: Any, spelled: np.ndarray) -> None:
    """Shares the bytes of a first character out among the tokens that are its bytes.

    Only of the first token does it matter: it may be one that does not count.
    """
    same = 1
    while same < len(spelled) and spelled[same] == 0 and encoding.offsets[same] == encoding.offsets[0]:
        same += 1
    if same > 1:
        spelled[:same] = spelled[0] / same


def _room(window: _Window, context: int) -> int:
    """Inputs of the row that a window is put into: there are three lengths, and so three programs."""
    inputs = len(window.ids) - 1
    return min(room for room in (context, max(context // 4, 2), max(context // 16, 2)) if room >= inputs)


def _by_length(windows: Sequence[_Window], context: int) -> Iterator[list[_Window]]:
    found: dict[int, list[_Window]] = defaultdict(list)
    for window in windows:
        found[_room(window, context)].append(window)
    yield from found.values()
