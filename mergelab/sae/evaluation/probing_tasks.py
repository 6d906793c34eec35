"""Yes-or-no questions about every token of a text, answered by the text itself: what probes are asked.

Python files answer those about Python, by the language's own tokeniser; for other text these are all no.
"""

from __future__ import annotations

import bisect
import io
import keyword
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergelab.text.contexts import cut_pieces
from mergelab.text.corpus import TextOptions, documents
from mergelab.text.corpus_tokens import TokenPiece, conversation_piece
from mergelab.text.tokenizer import load_tokenizer

__all__ = ["TASKS", "LabeledTokens", "character_labels", "label_texts"]

TASKS: Mapping[str, str] = {
    "is_code": "Python, outside of comments and strings",
    "in_string": "within a string literal, docstrings included",
    "in_comment": "within a comment",
    "is_keyword": "part of a keyword of Python",
    "is_operator": "part of an operator or bracket of Python",
    "is_number": "part of a number literal of Python",
    "is_indented": "on a line of Python at least two blocks deep",
    "in_brackets": "inside round, square or curly brackets of Python",
    "starts_line": "the first character of a line other than white space",
    "is_capital": "an upper-case letter",
    "is_digit": "a digit",
    "is_punctuation": "neither letter, digit, underscore nor white space",
}
"""Task -> when a character is a yes; a token is what its first character is other than white space."""

_NAMES = tuple(TASKS)
_CODE = ("is_code", "in_string", "in_comment", "is_keyword", "is_operator", "is_number")


@dataclass(frozen=True)
class LabeledTokens:
    """Contexts with the answers to every task.

    Attributes:
        tokens: int32 `[contexts, length]`.
        labels: labels by task, bool `[contexts, length]`.
    """

    tokens: np.ndarray
    labels: Mapping[str, np.ndarray]


def character_labels(text: str, *, python: bool) -> np.ndarray:
    """Answers for each character: bool `[tasks, characters]`, tasks in the order of `TASKS`.

    Args:
        text: the text.
        python: whether it is a Python source; one that cannot be tokenised counts as other text.
    """
    found = {name: np.zeros(len(text), bool) for name in _NAMES}
    fresh = True
    for at, character in enumerate(text):
        found["starts_line"][at] = fresh and not character.isspace()
        fresh = character == "\n" or (fresh and character.isspace())
        found["is_capital"][at] = character.isupper()
        found["is_digit"][at] = character.isdigit()
        found["is_punctuation"][at] = not (character.isalnum() or character.isspace() or character == "_")
    if python:
        try:
            _python(text, found)
        except (tokenize.TokenError, SyntaxError):
            for name in (*_CODE, "is_indented", "in_brackets"):
                found[name][:] = False
    return np.stack([found[name] for name in _NAMES])


def _python(text: str, found: Mapping[str, np.ndarray]) -> None:
    starts = [0]
    for line in io.StringIO(text, newline="\n"):
        starts.append(starts[-1] + len(line))
    depth = brackets = 0
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        (row, column), (end_row, end_column) = token.start, token.end
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
            continue
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER):
            continue
        span = slice(starts[row - 1] + column, starts[end_row - 1] + end_column)
        found["is_indented"][span] = depth >= 2
        if token.type == tokenize.OP and token.string in ")]}":
            brackets -= 1
        found["in_brackets"][span] = brackets > 0
        if token.type == tokenize.OP and token.string in "([{":
            brackets += 1
        # From Python 3.12 on the pieces of an f-string are tokens of their own.
        kind = tokenize.tok_name[token.type]
        if kind == "STRING" or kind.startswith(("FSTRING", "TSTRING")):
            found["in_string"][span] = True
        elif kind == "COMMENT":
            found["in_comment"][span] = True
        else:
            found["is_code"][span] = True
            found["is_keyword"][span] = keyword.iskeyword(token.string)
            found["is_operator"][span] = kind == "OP"
            found["is_number"][span] = kind == "NUMBER"


def label_texts(
    model: Path,
    texts: str | Path | Sequence[str | Path],
    length: int,
    options: TextOptions | None = None,
) -> LabeledTokens:
    """Texts in the tokens of a model's folder, with answers; files named `*.py` are Python.

    The contexts are those of `mergelab.text.contexts.text_contexts`. A text is held in memory whole, and a
    conversation as its template writes it.

    Args:
        model: the folder, with a `tokenizer.json`.
        texts: what `mergelab.text.corpus.documents` takes.
        length: tokens in a context.
        options: how the texts become contexts.

    Raises:
        SAEError: a text cannot be read, or they do not fill one context.
        CheckpointError: there is no tokenizer.
    """
    tokenizer, options = load_tokenizer(model), options or TextOptions()

    def labeled() -> Iterator[tuple[TokenPiece, np.ndarray]]:
        for document in documents(texts, options):
            path = document.path
            if document.messages is not None:
                piece, text, spans = conversation_piece(tokenizer, document, options)
            else:
                text = "".join(document.pieces)
                encoding = tokenizer.backend.encode(text, add_special_tokens=False)
                piece, spans = TokenPiece(np.array(encoding.ids, np.int32)), encoding.offsets
            labels = character_labels(text, python=path is not None and path.suffix == ".py")
            solid = np.flatnonzero([not character.isspace() for character in text])
            bits = (labels.T.astype(np.int32) << np.arange(len(_NAMES), dtype=np.int32)).sum(axis=1)
            yield piece, np.array([_answer(bits, solid, span) for span in spans], np.int32)

    found = cut_pieces(labeled(), tokenizer, length, options)
    values = found.values
    assert values is not None
    # Tokens that are none of the text are a no to every task.
    return LabeledTokens(
        found.tokens, {name: (values >> i & 1).astype(bool) for i, name in enumerate(_NAMES)}
    )


def _answer(bits: np.ndarray, solid: np.ndarray, span: tuple[int, int]) -> int:
    """The answers of a token's first character other than white space, else of its first."""
    at = bisect.bisect_left(solid, span[0])
    if at < len(solid) and solid[at] < span[1]:
        return int(bits[solid[at]])
    return int(bits[span[0]]) if span[0] < span[1] else 0
