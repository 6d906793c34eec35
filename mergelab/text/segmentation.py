"""How a tokenizer cuts a text: bytes in a token, numbers, whitespace, and characters that fall into bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mergelab.errors import MergelabError
from mergelab.text.tokenizer import Tokenizer

__all__ = ["Segmentation", "segment"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NUMBER = "1234567"
_SPACES = ("▁", "Ġ", " ")
"""The space as SentencePiece, byte-level and other vocabularies spell it."""
_INDENTS = (2, 4, 8)
_MOST = 10


@dataclass(frozen=True)
class Segmentation:
    """A text in the tokens of one tokenizer, without those that begin and end texts.

    Attributes:
        bytes: length of the text as UTF-8.
        characters: its characters.
        tokens: its tokens.
        vocab_size: tokens that the tokenizer has.
        used: different tokens among those of the text.
        unknown: tokens that stand for text the vocabulary cannot spell.
        byte_fallback: tokens that are bytes of a character: `<0xE2>`, or a piece of one in byte-level
            vocabularies.
        fallback_text: what those tokens spell, the most frequent first, with their numbers.
        digits: how numbers are cut, in words, as seen in `1234567`.
        number: the pieces of that number.
        digits_per_token: tokens of digits in the text by the number of their digits.
        space: where the space between two words goes.
        indents: tokens that 2, 4 and 8 spaces at the beginning of a line add.
        whitespace_tokens: tokens of the text that are nothing but whitespace.
        lossless: whether the tokens decode to the very text.
    """

    bytes: int
    characters: int
    tokens: int
    vocab_size: int
    used: int
    unknown: int
    byte_fallback: int
    fallback_text: dict[str, int]
    digits: str
    number: tuple[str, ...]
    digits_per_token: dict[int, int]
    space: str
    indents: dict[int, int]
    whitespace_tokens: int
    lossless: bool

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token; more is shorter sequences."""
        return self.bytes / self.tokens


def segment(tokenizer: Tokenizer, text: str) -> Segmentation:
    """Cuts a text, and a few short ones that show how numbers and whitespace are cut.

    Raises:
        MergelabError: there is nothing in the text that becomes a token.
    """
    ids = _ids(tokenizer, text)
    if not ids:
        raise MergelabError("the text has no tokens; give one that is not empty.")
    counts = Counter(ids)
    pieces = {token: tokenizer.piece(token) for token in counts}
    parts = {token for token in counts if _is_part(tokenizer, token, pieces[token])}
    digits: Counter[int] = Counter()
    for token, count in counts.items():
        piece = pieces[token].strip()
        if piece.isascii() and piece.isdigit() and token not in parts:
            digits[len(piece)] += count
    number = tuple(piece for token in _ids(tokenizer, _NUMBER) if (piece := tokenizer.piece(token).strip()))
    unknown = _unknown(tokenizer)
    return Segmentation(
        bytes=len(text.encode("utf-8", errors="surrogatepass")),
        characters=len(text),
        tokens=len(ids),
        vocab_size=tokenizer.vocab_size,
        used=len(counts),
        unknown=0 if unknown is None else counts[unknown],
        byte_fallback=sum(counts[token] for token in parts),
        fallback_text=_spelled(tokenizer, ids, parts),
        digits=_cut(number),
        number=number,
        digits_per_token=dict(sorted(digits.items())),
        space=_space(tokenizer),
        indents={n: len(_ids(tokenizer, f"a\n{' ' * n}b")) - len(_ids(tokenizer, "a\nb")) for n in _INDENTS},
        whitespace_tokens=sum(counts[token] for token, piece in pieces.items() if piece.isspace()),
        lossless=tokenizer.decode(ids, skip_special_tokens=False) == text,
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _is_part(tokenizer: Tokenizer, token: int, piece: str) -> bool:
    raw = tokenizer.backend.id_to_token(token) or ""
    return _BYTE.fullmatch(raw) is not None or tokenizer.shown_piece(token) != piece


def _unknown(tokenizer: Tokenizer) -> int | None:
    if (found := tokenizer.id_of("unk")) is not None:
        return found
    token = getattr(tokenizer.backend.model, "unk_token", None)
    return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None


def _spelled(tokenizer: Tokenizer, ids: Sequence[int], parts: set[int]) -> dict[str, int]:
    """The characters in runs of byte tokens, by how often they occur."""
    found: Counter[str] = Counter()
    for is_part, run in groupby(ids, key=parts.__contains__):
        if is_part:
            found.update(tokenizer.decode(list(run), skip_special_tokens=False).replace(" ", ""))
    return dict(found.most_common(_MOST))


def _cut(pieces: Sequence[str]) -> str:
    """Words for how a number is cut."""
    if "".join(pieces) != _NUMBER:
        return "not kept"
    sizes = [len(piece) for piece in pieces]
    most, short = max(sizes), len(_NUMBER) % max(sizes) or max(sizes)
    full = [most] * (len(sizes) - 1)
    if len(sizes) == 1:
        return "whole"
    if most == 1:
        return "one by one"
    if sizes == [*full, short]:
        return f"by {most} from the left"
    return f"by {most} from the right" if sizes == [short, *full] else "as the vocabulary has them"


def _space(tokenizer: Tokenizer) -> str:
    raw = [tokenizer.backend.id_to_token(token) or "" for token in _ids(tokenizer, "one two")]
    # The first piece may bring a space that is not in the text.
    if any(piece in _SPACES for piece in raw[1:]):
        return "own token"
    return "joins the word" if any(piece.startswith(_SPACES) for piece in raw[1:]) else "dropped"
