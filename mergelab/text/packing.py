"""Token streams cut into contexts of a fixed length."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.errors import MergelabError

__all__ = [
    "Contexts",
    "EvaluationWindows",
    "evaluation_windows",
    "pack_stream",
    "pack_whole",
    "random_windows",
    "same_document",
    "token_stream",
]


@dataclass(frozen=True)
class Contexts:
    """Documents in contexts of one length.

    Attributes:
        tokens: int32 `[contexts, length]`.
        segments: int32 `[contexts, length]`; the pieces of documents in a context are numbered from 1, 0 is
            padding.
        positions: int32 `[contexts, length]`, counted from 0 within each piece; 0 on padding.
        documents: int32 `[contexts, length]`, the index of the document each token comes from; -1 on padding.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    documents: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """True, `[contexts, length]`, for tokens of documents."""
        return self.segments > 0

    @property
    def fill(self) -> float:
        """The share of places that hold tokens of documents."""
        return float(self.mask.mean()) if self.tokens.size else 0.0


def pack_stream(
    documents: Sequence[Sequence[int]], length: int, *, separator: int | None = None, pad_id: int = 0
) -> Contexts:
    """Joins the documents in order and cuts the stream every `length` tokens; the last context is padded.

    Args:
        documents: token ids.
        length: tokens of a context.
        separator: a token put after every document, as part of it (the one that ends a text); None for none.
        pad_id: the token of padding.

    Raises:
        MergelabError: `length` is not positive.
    """
    _check(length)
    rows: list[list[_Piece]] = [[]]
    room = length
    for index, document in enumerate(_ended(documents, separator)):
        start = 0
        while start < len(document):
            if not room:
                rows.append([])
                room = length
            end = min(len(document), start + room)
            rows[-1].append(_Piece(index, document[start:end]))
            room -= end - start
            start = end
    return _contexts(rows, length, pad_id)


def pack_whole(
    documents: Sequence[Sequence[int]], length: int, *, separator: int | None = None, pad_id: int = 0
) -> Contexts:
    """Best-fit decreasing (Ding et al., arXiv:2404.10830): the longest first, each where least room is left.

    Documents longer than a context are cut into contexts, and their remainders fitted like documents. Of
    equal lengths the earlier document goes first; of contexts with equal room, the older one is filled.

    Args:
        documents: token ids.
        length: tokens of a context.
        separator: a token put after every document, as part of it (the one that ends a text); None for none.
        pad_id: the token of padding.

    Raises:
        MergelabError: `length` is not positive.
    """
    _check(length)
    pieces = [
        _Piece(index, document[start : start + length])
        for index, document in enumerate(_ended(documents, separator))
        for start in range(0, len(document), length)
    ]
    pieces.sort(key=lambda piece: -len(piece.tokens))  # stable
    rows: list[list[_Piece]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in pieces:
        size = len(piece.tokens)
        place = bisect.bisect_left(rooms, (size, -1))
        if place == len(rooms):
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(piece)
        bisect.insort(rooms, (room - size, row))
    return _contexts(rows, length, pad_id)


def same_document(segments: np.ndarray) -> np.ndarray:
    """Which keys a query may see when documents must not see each other.

    Args:
        segments: int `[contexts, length]`, as in `Contexts`.

    Returns:
        Bool `[contexts, query, key]`: True where both lie in one piece and the key is not later.
    """
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return same & np.tri(length, dtype=bool)[None]


@dataclass(frozen=True)
class _Piece:
    document: int
    tokens: np.ndarray


def _ended(documents: Sequence[Sequence[int]], separator: int | None) -> Iterator[np.ndarray]:
    end = [] if separator is None else [separator]
    for document in documents:
        yield np.array([*document, *end], np.int32)


def _contexts(rows: Sequence[Sequence[_Piece]], length: int, pad_id: int) -> Contexts:
    rows = [row for row in rows if row]
    shape = (len(rows), length)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    positions, documents = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row, 1):
            end = start + len(piece.tokens)
            tokens[i, start:end] = piece.tokens
            segments[i, start:end] = number
            positions[i, start:end] = np.arange(end - start)
            documents[i, start:end] = piece.document
            start = end
    return Contexts(tokens, segments, positions, documents)


def _check(length: int) -> None:
    if length < 1:
        raise MergelabError(f"contexts were asked to be {length} tokens long; give a length of at least 1.")


def token_stream(documents: Sequence[Sequence[int]], separator: int) -> np.ndarray:
    """Joins tokenised documents into one int32 stream, `separator` before each and after the last."""
    joined = [np.array([separator, *document], np.int32) for document in documents]
    return np.concatenate([*joined, np.array([separator], np.int32)])


def random_windows(stream: np.ndarray, length: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless int32 batches `[batch, length + 1]` of windows drawn uniformly from the stream."""
    starts = np.random.default_rng(seed)
    offsets = np.arange(length + 1)
    while True:
        yield stream[starts.integers(0, len(stream) - length, size=(batch, 1)) + offsets]


@dataclass(frozen=True)
class EvaluationWindows:
    """Disjoint windows that cover a text: every token is a target exactly once.

    Attributes:
        tokens: int32 `[windows, length + 1]`; column 0 is context only, the rest are targets.
        is_target: bool `[windows, length]`, False on padding.
        num_bytes: UTF-8 bytes of the text the targets spell.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    num_bytes: int


def evaluation_windows(
    documents: Sequence[Sequence[int]], separator: int, length: int, num_bytes: int
) -> EvaluationWindows:
    """Windows over documents, each begun afresh: a window sees `separator` or the token before it, no more.

    The separator is never a target, so the targets are exactly the documents' tokens.
    """
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for document in documents:
        stream = np.array([separator, *document], np.int32)
        for start in range(0, len(document), length):
            window = stream[start : start + length + 1]
            padding = length + 1 - len(window)
            rows.append(np.pad(window, (0, padding), constant_values=separator))
            masks.append(np.arange(length) < len(window) - 1)
    return EvaluationWindows(np.stack(rows), np.stack(masks), num_bytes)
