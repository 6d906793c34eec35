"""Documents to token ids: long texts in windows that join without a seam, conversations by their template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from mergelab.errors import ChatTemplateError, CorpusError
from mergelab.text.chat import chat_text, turn_end_ids
from mergelab.text.corpus import START, CorpusPosition, Document, TextOptions
from mergelab.text.tokenizer import Tokenizer

__all__ = ["TokenPiece", "bos_of", "conversation_piece", "token_pieces"]

WINDOW = 1 << 17
"""Characters that are tokenized at a time; shorter documents are tokenized whole."""

_OVERLAP = 1 << 11
_BATCH = 1 << 19
"""Characters in one call of the tokenizer, which spreads them over the cores."""

_AGREED = 16
"""Tokens on which two windows must agree where they join."""

_LARGEST = 1 << 22
"""Characters after which a text without a place to join at (one endless run) is cut at a window's end."""


@dataclass(frozen=True)
class TokenPiece:
    """Tokens of a document, or of a piece of it.

    Attributes:
        ids: int32 `[n]`.
        counted: bool `[n]`, whether tokens were asked for; None for all.
        first: whether the document begins here.
        last: whether it ends here.
        conversation: whether it is one, whose template says how it begins and ends.
        after: position behind it, from which the corpus can be read on.
    """

    ids: np.ndarray
    counted: np.ndarray | None = None
    first: bool = True
    last: bool = True
    conversation: bool = False
    after: CorpusPosition = START


def bos_of(tokenizer: Tokenizer, asked: bool | str = "auto") -> int | None:
    """The token that is to begin texts; None for none.

    Args:
        tokenizer: a model's.
        asked: `auto` takes what its post-processor puts before a single text, if that is one token and no
            frame; True takes that, or else the model's `bos_token`; False none.

    Raises:
        CorpusError: True was asked for, but the tokenizer has no such token.
    """
    if asked is False:
        return None
    if tokenizer.frame is not None:
        added: list[int] = []
    else:
        plain = tokenizer.encode("a", add_special_tokens=False)
        whole = tokenizer.encode("a")
        before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        added = whole[:before]
    if len(added) == 1:
        return added[0]
    if asked is True:
        if (found := tokenizer.id_of("bos")) is None:
            raise CorpusError(f"{tokenizer.folder} names no bos_token to begin texts with; set bos: false")
        return found
    return None


def token_pieces(
    tokenizer: Tokenizer, documents: Iterable[Document], options: TextOptions | None = None
) -> Iterator[TokenPiece]:
    """The tokens of documents, in their order, without tokens between them.

    Raises:
        CorpusError: a conversation cannot be rendered, or its assistant turns cannot be told.
    """
    options = options or TextOptions()
    chat = _Chat(tokenizer, options)
    waiting: list[tuple[str, CorpusPosition]] = []
    size = 0
    for document in documents:
        if document.messages is not None:
            yield from _whole(tokenizer, waiting)
            waiting, size = [], 0
            yield replace(chat.piece(document)[0], after=document.after)
            continue
        begun: list[str] = []
        pieces = iter(document.pieces)
        length = 0
        for piece in pieces:
            begun.append(piece)
            length += len(piece)
            if length > WINDOW:
                break
        text = "".join(begun)
        if length > WINDOW or document.begun:
            yield from _whole(tokenizer, waiting)
            waiting, size = [], 0
            yield from _long(tokenizer, document, chain([text], pieces))
            continue
        waiting.append((text, document.after))
        size += length
        if size >= _BATCH or len(waiting) >= 1024:
            yield from _whole(tokenizer, waiting)
            waiting, size = [], 0
    yield from _whole(tokenizer, waiting)


def _whole(tokenizer: Tokenizer, texts: list[tuple[str, CorpusPosition]]) -> Iterator[TokenPiece]:
    if texts:
        found = tokenizer.backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        for (_, after), encoding in zip(texts, found, strict=True):
            yield TokenPiece(np.array(encoding.ids, np.int32), after=after)


def _long(tokenizer: Tokenizer, document: Document, pieces: Iterable[str]) -> Iterator[TokenPiece]:
    """The tokens of a long text, or of the rest of one."""
    start = document.before if document.begun else replace(document.before, characters=0, tokens=0)
    first = not document.begun
    for ids, at, skipped in _windowed(tokenizer, pieces, start.characters, start.tokens):
        after = document.after if at is None else replace(start, characters=at, tokens=skipped)
        yield TokenPiece(ids, first=first, last=at is None, after=after)
        first = False


@dataclass
class _WindowTokens:
    """Tokens of a window, and where they start in the document: int32 `[n]`, int64 `[n]`."""

    text: str
    at: int
    ids: np.ndarray
    starts: np.ndarray
    skipped: int = 0  # tokens that the window before has given

    @classmethod
    def of(cls, text: str, at: int, encoding: Any) -> _WindowTokens:
        starts = np.array([start for start, _ in encoding.offsets], np.int64) + at
        return cls(text, at, np.array(encoding.ids, np.int32), starts)

    @property
    def end(self) -> int:
        return self.at + len(self.text)


def _windowed(
    tokenizer: Tokenizer, pieces: Iterable[str], at: int, skipped: int
) -> Iterator[tuple[np.ndarray, int | None, int]]:
    """The tokens of a long text: those of overlapping windows, joined where both say the same.

    With each go the place of the next window (None behind the last) and the tokens of it that are done:
    `at` and `skipped` of a call that goes on there.

    Splitting and merging look at a few characters around, so that two windows that agree on many tokens go on
    alike; what the start of a window does to its first tokens (a space that is put before a text) is in the
    part that is not taken.
    """
    left: _WindowTokens | None = None
    for right in _windows(tokenizer, pieces, at):
        if left is None:
            left, left.skipped = right, skipped
            continue
        cut = _agreement(left, right)
        if cut is None and len(left.text) < _LARGEST:
            text = left.text + right.text[left.end - right.at :]
            [encoding] = tokenizer.backend.encode_batch([text], add_special_tokens=False)
            left, before = _WindowTokens.of(text, left.at, encoding), left
            left.skipped = before.skipped
            continue
        if cut is None:
            cut = int(np.searchsorted(left.starts, right.at)), 0
        yield left.ids[left.skipped : cut[0]], right.at, cut[1]
        left, left.skipped = right, cut[1]
    if left is not None:
        yield left.ids[left.skipped :], None, 0


def _windows(tokenizer: Tokenizer, pieces: Iterable[str], at: int) -> Iterator[_WindowTokens]:
    """Windows of `WINDOW` characters that overlap, tokenized several at a time; the text begins at `at`."""
    batch: list[tuple[str, int]] = []
    text = ""

    def encoded() -> Iterator[_WindowTokens]:
        found = tokenizer.backend.encode_batch([one for one, _ in batch], add_special_tokens=False)
        for (one, start), encoding in zip(batch, found, strict=True):
            yield _WindowTokens.of(one, start, encoding)
        batch.clear()

    for piece in pieces:
        text += piece
        begin = 0
        while len(text) - begin > WINDOW:
            batch.append((text[begin : begin + WINDOW], at + begin))
            begin += WINDOW - _OVERLAP
            if len(batch) * WINDOW >= _BATCH:
                yield from encoded()
        text, at = text[begin:], at + begin
    batch.append((text, at))
    yield from encoded()


def _agreement(left: _WindowTokens, right: _WindowTokens) -> tuple[int, int] | None:
    """Numbers of one and the same token in two windows, from which on the right one is taken."""
    low, high = right.at + _OVERLAP // 8, left.end - _OVERLAP // 8
    mine = slice(*np.searchsorted(left.starts, [low, high]).tolist())
    other = slice(*np.searchsorted(right.starts, [low, high]).tolist())
    count = min(mine.stop - mine.start, other.stop - other.start)
    if count <= 0:
        return None
    i, j = mine.stop - count, other.stop - count
    same = (left.starts[i : mine.stop] == right.starts[j : other.stop]) & (
        left.ids[i : mine.stop] == right.ids[j : other.stop]
    )
    agreed = count if same.all() else count - 1 - int(np.flatnonzero(~same)[-1])
    if agreed < _AGREED:
        return None
    # From the middle on, the first token that begins where the one before it does not.
    for back in range(agreed // 2, 0, -1):
        n = mine.stop - back
        if left.starts[n] > left.starts[n - 1] and n >= left.skipped:
            return n, other.stop - back
    return None


def conversation_piece(
    tokenizer: Tokenizer, document: Document, options: TextOptions
) -> tuple[TokenPiece, str, list[tuple[int, int]]]:
    """The tokens of a conversation, the text its template makes of it, and where each token stands in that.

    Raises:
        CorpusError: it cannot be rendered, or its assistant turns cannot be told.
    """
    return _Chat(tokenizer, options).piece(document)


class _Chat:
    """Conversations in the words of the model's template."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._tokenizer, self._asked = tokenizer, options.roles
        self._ends: frozenset[int] | None = None

    def piece(self, document: Document) -> tuple[TokenPiece, str, list[tuple[int, int]]]:
        messages = list(document.messages or ())
        text = self._render(document, messages)
        encoding = self._tokenizer.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if self._asked == "all":
            return TokenPiece(ids, conversation=True), text, encoding.offsets
        if self._ends is None:
            self._ends = frozenset(turn_end_ids(self._tokenizer))
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        counted = np.zeros(len(ids), bool)
        for begin, end in self._spans(document, messages, text):
            inside = np.flatnonzero((starts >= begin) & (starts < end))
            counted[inside] = True
            after = int(inside[-1]) + 1 if len(inside) else len(ids)
            if after < len(ids) and int(ids[after]) in self._ends:
                counted[after] = True
        return TokenPiece(ids, counted, conversation=True), text, encoding.offsets

    def _render(self, document: Document, messages: list[Any]) -> str:
        try:
            return chat_text(self._tokenizer, messages, add_generation_prompt=False)
        except ChatTemplateError as error:
            raise CorpusError(f"{document.place}: {error}") from None

    def _spans(self, document: Document, messages: list[Any], text: str) -> list[tuple[int, int]]:
        """Where the contents of assistant turns stand in the rendered text.

        They are rendered once more with marks in their place; what stands around the marks must be what
        stands around the contents.
        """
        turns = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
        marks = {n: f"@@{n}mark{n}@@" for n in turns}
        marked = self._render(
            document,
            [{**turn, "content": marks[n]} if n in marks else turn for n, turn in enumerate(messages)],
        )
        around = re.split("|".join(map(re.escape, marks.values())) or "(?!)", marked)
        if len(around) == len(turns) + 1:
            for form in (str, str.strip, str.lstrip, str.rstrip):
                spans, rebuilt = [], around[0]
                for n, behind in zip(turns, around[1:], strict=True):
                    content = form(str(messages[n]["content"]))
                    spans.append((len(rebuilt), len(rebuilt) + len(content)))
                    rebuilt += content + behind
                if rebuilt == text:
                    return spans
        raise CorpusError(
            f"{document.place}: the chat template of {self._tokenizer.folder} rewrites what assistants say, "
            "so their turns cannot be told from the rest; count all tokens (roles: all)"
        )
