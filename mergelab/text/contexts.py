"""Streams of token pieces cut into contexts of one length, in memory or, where they are many, in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.errors import CorpusError
from mergelab.text.corpus import Document, TextOptions
from mergelab.text.corpus_tokens import TokenPiece, bos_of, token_pieces
from mergelab.text.token_rows import TokenRows
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Cutter", "TextContexts", "cut_pieces", "text_contexts"]


@dataclass(frozen=True)
class TextContexts:
    """Contexts of a corpus.

    Attributes:
        tokens: int32 `[contexts, length]`; a `mergelab.text.token_rows.StoredTokens` where
            they are many.
        counted: bool `[contexts, length]`, False for padding and for turns that were not asked for; None
            where all tokens count.
        bos: token that begins texts and contexts; None for none.
        framed: whether each context stands between a first and a last token of its own.
        exhausted: whether all documents were read.
        values: int32 `[contexts, length]`, what was given beside the ids; None if nothing was.
    """

    tokens: np.ndarray
    counted: np.ndarray | None = None
    bos: int | None = None
    framed: bool = False
    exhausted: bool = True
    values: np.ndarray | None = None


def text_contexts(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    length: int,
    options: TextOptions | None = None,
    *,
    check: Callable[[np.ndarray], None] = lambda ids: None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> TextContexts:
    """Documents as contexts of `length` tokens; memory does not depend on how many they are.

    A token that ends texts stands between texts that are packed. The frame of an encoder's tokenizer, or the
    token that begins texts, stands in each context.

    Args:
        tokenizer: the model's.
        documents: texts and conversations.
        length: tokens of a context, all of these included.
        options: how.
        check: function that is called with all ids once, and raises for those a model does not have.
        progress: function that is called with the tokens so far.

    Raises:
        CorpusError: a text cannot be read, or they do not fill one context.
    """
    options = options or TextOptions()
    pieces = token_pieces(tokenizer, documents, options)
    return cut_pieces(
        ((piece, None) for piece in pieces), tokenizer, length, options, check=check, progress=progress
    )


def cut_pieces(
    pieces: Iterable[tuple[TokenPiece, np.ndarray | None]],
    tokenizer: Tokenizer,
    length: int,
    options: TextOptions,
    *,
    check: Callable[[np.ndarray], None] = lambda ids: None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> TextContexts:
    """Pieces, each with int32 values beside its ids or None, as contexts; arguments as of `text_contexts`."""
    held = iter(pieces)
    begun = next(held, None)
    cutter = Cutter(tokenizer, length, options, check, valued=begun is not None and begun[1] is not None)
    exhausted = True
    with closing(cutter):
        for piece, values in chain([] if begun is None else [begun], held):
            cutter.add(piece, values)
            progress(cutter.tokens.count)
            if cutter.full:
                exhausted = False
                break
        return cutter.finished(exhausted)


class Cutter:
    """Cuts pieces, with what stands between and around; columns are ids, whether they count, and values.

    Args:
        tokenizer: the model's.
        length: tokens of a context.
        options: how texts become contexts.
        check: function that is called with all ids once.
        valued: whether there are values beside the ids.
        folder: folder of the files that are kept; None keeps none.
        held: elements of each kind that are held in memory.

    Attributes:
        tokens: ids of the contexts so far.
        sum_counted: how many of them count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        length: int,
        options: TextOptions,
        check: Callable[[np.ndarray], None],
        *,
        valued: bool = False,
        folder: Path | None = None,
        held: int | None = None,
    ) -> None:
        if length < 1:
            raise CorpusError(f"contexts were asked to be {length} tokens long; give a length of at least 1.")
        self.length, self._options, self._check = length, options, check
        self._bos, self._frame = bos_of(tokenizer, options.bos), tokenizer.frame
        self._end = next(iter(tokenizer.end_ids), None)
        self._alone = options.packing == "documents"
        if self._alone and self._frame is not None:
            raise CorpusError(
                f"{tokenizer.folder} is an encoder's tokenizer, whose model would look at padding; set "
                "packing: packed"
            )

        def rows(name: str, dtype: Any) -> TokenRows:
            return TokenRows(dtype, None if folder is None else folder / name, held)

        self.tokens, self._counts = rows("tokens", np.int32), rows("counted", np.bool_)
        self._values = rows("values", np.int32)
        self._counts_some = self._alone or options.roles != "all"
        self._valued = valued
        self.sum_counted = 0
        self._rest = np.zeros((0, 3), np.int32)

    def add(self, piece: TokenPiece, values: np.ndarray | None) -> None:
        """Takes a piece, and gives the contexts that are full to the channels."""
        rows = np.zeros((len(piece.ids), 3), np.int32)
        rows[:, 0] = piece.ids
        rows[:, 1] = True if piece.counted is None else piece.counted
        if values is not None:
            rows[:, 2] = values
        parts = [self._rest]
        begins = len(piece.ids) > 0 and piece.ids[0] == self._bos  # a template writes it itself
        if piece.first and self._bos is not None and not begins:
            parts.append(self._one(self._bos))
        parts.append(rows)
        if piece.last and self._end is not None and not piece.conversation and not self._alone:
            parts.append(self._one(self._end))
        self._rest = self._cut(np.concatenate(parts))
        if self._alone and piece.last and len(self._rest):
            rest = self._with_bos(self._rest)
            filler = np.zeros((self.length - len(rest), 3), np.int32)
            filler[:, 0] = 0 if self._end is None else self._end
            self._give(np.concatenate([rest, filler])[None])
            self._rest = self._rest[:0]

    @property
    def full(self) -> bool:
        """Whether there are as many tokens that count as were asked for."""
        return self._options.tokens is not None and self.sum_counted >= self._options.tokens

    def save(self) -> dict[str, Any]:
        """Puts the contexts so far on the disk, and tells what else `restore` needs: plain JSON."""
        for rows in self._kinds():
            rows.save()
        return {"tokens": self.tokens.count, "counted": self.sum_counted, "rest": self._rest.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> bool:
        """Goes on where `save` was called; False where the files do not hold that much."""
        self.sum_counted = int(saved["counted"])
        self._rest = np.array(saved["rest"], np.int32).reshape(-1, 3)
        return all([rows.restore(int(saved["tokens"])) for rows in self._kinds()])

    def close(self) -> None:
        """Gives up the files."""
        for rows in self._kinds():
            rows.close()

    def _kinds(self) -> list[TokenRows]:
        counts, values = [self._counts] * self._counts_some, [self._values] * self._valued
        return [self.tokens, *counts, *values]

    def _one(self, token: int) -> np.ndarray:
        """A token that belongs to no turn."""
        return np.array([[token, self._options.roles == "all", 0]], np.int32)

    def _with_bos(self, rows: np.ndarray) -> np.ndarray:
        if self._bos is None or rows[0, 0] == self._bos:
            return rows
        return np.concatenate([self._one(self._bos), rows])

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        """Gives whole contexts, and returns the rest."""
        if self._bos is None:
            room = self.length - (0 if self._frame is None else 2)
            if room < 1:
                return rows[:0]
            count = len(rows) // room
            if count:
                whole = rows[: count * room].reshape(count, room, 3)
                if self._frame is not None:
                    first, last = (np.tile(self._one(token), (count, 1, 1)) for token in self._frame)
                    whole = np.concatenate([first, whole, last], axis=1)
                self._give(whole)
            return rows[count * room :]
        found, at = [], 0
        if self.length < 2:
            raise CorpusError(
                "contexts of 1 token hold nothing but the token that begins them; ask for more."
            )
        while True:
            end = at + self.length - (at < len(rows) and rows[at, 0] != self._bos)
            if end > len(rows):
                break
            found.append(self._with_bos(rows[at:end]))
            at = end
        if found:
            self._give(np.stack(found))
        return rows[at:]

    def _give(self, contexts: np.ndarray) -> None:
        ids = contexts[:, :, 0]
        self._check(ids)
        self.tokens.add(ids)
        self.sum_counted += int(contexts[:, :, 1].sum())
        if self._counts_some:
            self._counts.add(contexts[:, :, 1])
        if self._valued:
            self._values.add(contexts[:, :, 2])

    def finished(self, exhausted: bool) -> TextContexts:
        """All contexts; of the last piece no more than were asked for."""
        if not self.tokens.count:
            raise CorpusError(f"the texts do not fill one context of {self.length} tokens; give more text.")
        tokens = self.tokens.array(self.length)
        counted = self._counts.array(self.length) if self._counts_some else None
        values = self._values.array(self.length) if self._valued else None
        most = self._options.tokens
        if most is not None and self.sum_counted > most:
            if counted is None:
                keep = -(-most // self.length)
            else:
                keep = int(np.searchsorted(np.cumsum(counted.sum(axis=1)), most)) + 1
            tokens, counted, values = (
                None if array is None else array[:keep] for array in (tokens, counted, values)
            )
            assert tokens is not None
        if counted is not None and not counted.any():
            raise CorpusError("no token of the texts counts: their conversations have no assistant turn.")
        if counted is not None and counted.all():
            counted = None
        return TextContexts(tokens, counted, self._bos, self._frame is not None, exhausted, values)
