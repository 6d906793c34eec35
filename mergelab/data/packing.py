"""Packs documents into contexts of one length, and says where each document begins.

Two ways: `pack_stream` joins documents and cuts the stream, which wastes nothing and cuts documents wherever
they lie; `pack_whole` fits whole documents together and pads, which cuts only what is longer than a
context. Both are functions of their input alone: no seed, no order but the given one.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.errors import MergelabError

__all__ = ["Contexts", "pack_stream", "pack_whole", "same_document"]


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
        length: of a context.
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
        length: of a context.
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
