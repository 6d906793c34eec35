"""`mergelab inspect MODEL --text FILE`: how one tokenizer, or two side by side, cut a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.cli.output import print_result

if TYPE_CHECKING:
    from mergelab.text.segmentation import Segmentation

__all__ = ["show_segmentations"]

_LARGEST = 2**26
"""Bytes of a text that is cut: enough for any average, and seconds of work."""


def show_segmentations(text: Path, models: Sequence[Path], *, as_json: bool) -> None:
    """Prints how the tokenizers of models cut the text of a file.

    Args:
        text: File of the text.
        models: Model folders, hub models or GGUF files; one or two.
        as_json: Whether figures are printed as JSON.

    Raises:
        MergelabError: the text or a tokenizer cannot be read, or the text is empty.
    """
    from mergelab.checkpoints.locations import location_text
    from mergelab.checkpoints.text_file import read_text
    from mergelab.errors import MergelabError
    from mergelab.text.segmentation import segment
    from mergelab.text.tokenizer import load_tokenizer

    content = read_text(text, _LARGEST, error=MergelabError)
    if not content:
        raise MergelabError(f"{text} is empty; give a text to cut into tokens.")
    names = [location_text(model) for model in models]
    found = [segment(load_tokenizer(model), content) for model in models]

    def data() -> dict[str, Any]:
        figures = [
            {"path": name, **asdict(one), "bytes_per_token": one.bytes_per_token}
            for name, one in zip(names, found, strict=True)
        ]
        return {"text": str(text), "tokenizers": figures}

    print_result(data, lambda: _table(names, found), as_json=as_json)


def _table(names: Sequence[str], found: Sequence[Segmentation]) -> str:
    from mergelab.report.tables import text_table

    columns = [_column(one) for one in found]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    lines = [f"{found[0].bytes:,} bytes, {found[0].characters:,} characters"]
    lines.append(text_table(["", *names], rows))
    if len(found) > 1:
        lines.append(
            f"{names[1]} needs {found[1].tokens / found[0].tokens:.3g} times the tokens of {names[0]}"
        )
    return "\n".join(lines)


def _column(one: Segmentation) -> dict[str, str]:
    sizes = ", ".join(f"{count:,} of {size}" for size, count in one.digits_per_token.items())
    spelled = " ".join(
        character if character.isprintable() else repr(character) for character in one.fallback_text
    )
    return {
        "tokens": f"{one.tokens:,}",
        "bytes per token": f"{one.bytes_per_token:.3f}",
        "vocabulary": f"{one.vocab_size:,}",
        "different tokens used": f"{one.used:,}",
        "numbers": f"{one.digits} ({'|'.join(one.number)})",
        "tokens of digits": sizes or "none",
        "space between words": one.space,
        "tokens for 2, 4, 8 spaces": ", ".join(map(str, one.indents.values())),
        "tokens of whitespace": f"{one.whitespace_tokens:,}",
        "tokens that are bytes": f"{one.byte_fallback:,}" + (f" ({spelled})" if spelled else ""),
        "unknown": f"{one.unknown:,}",
        "decodes to the same text": "yes" if one.lossless else "no",
    }
