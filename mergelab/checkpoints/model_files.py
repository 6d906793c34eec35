"""Files besides weights: allowed names, tokenizer files read within bounds, and a donor's copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from mergelab.checkpoints.companions import has_companion, read_companion
from mergelab.checkpoints.text_file import MAX_TABLE
from mergelab.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["check_file_name", "donor_files", "open_tokenizer_file", "tokenizer_names"]


_FORBIDDEN = frozenset('/\\:*?"<>|')
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))]
)


def check_file_name(name: object, place: str) -> str:
    """Returns `name` if it is one relative file name on every system.

    An index is written by a stranger: a separator, a drive, `..`, a device name or a control character in it
    could make a reader or writer leave the model's folder.

    Raises:
        CheckpointError: it is not; `place` says where it stood.
    """
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{place} gives {name!r} where a file name was expected; correct the file")
    unsafe = (
        name in (".", "..")
        or any(character in _FORBIDDEN or ord(character) < 32 for character in name)
        or name[-1] in " ."
        or PureWindowsPath(name).stem.upper() in _DEVICES
        or len(name) > 255
    )
    if unsafe:
        raise CheckpointError(
            f"{place} gives the file name {name!r}, which is not one plain name inside the model's folder; "
            "do not use this copy of the model"
        )
    return name


def open_tokenizer_file(path: Path) -> Tokenizer:
    """Returns the tokenizer that a `tokenizer.json` describes, as the tokenizers package makes it.

    Args:
        path: the file, in the folder of a model or "in" a GGUF file.

    Raises:
        CheckpointError: the file is not a regular file of at most 256 MiB, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    raw = read_companion(path.parent, path.name, MAX_TABLE)
    try:
        return Tokenizer.from_str(raw.decode("utf-8-sig"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises bare Exception, and panics past it
        raise CheckpointError(
            f"{path} is not a tokenizer.json as the tokenizers package writes it "
            f"({shortened(str(error), 200)}); copy it again."
        ) from error


_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_OTHER = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)


def tokenizer_names() -> tuple[str, ...]:
    """The names under which tokenizers are stored."""
    return _TOKENIZER


def donor_files(folder: Path, merged_tokenizer: Mapping[str, bytes] | None) -> dict[str, bytes]:
    """File contents by name: the donor's, its tokenizer replaced by a merged one where there is one.

    Args:
        folder: the donor's folder or GGUF file.
        merged_tokenizer: the files of a merged tokenizer, or None.

    Raises:
        CheckpointError: a file is a Git LFS pointer.
    """
    names = (*_TEMPLATES, *_OTHER) if merged_tokenizer is not None else (*_TOKENIZER, *_TEMPLATES, *_OTHER)
    found = {name: read_companion(folder, name, MAX_TABLE) for name in names if has_companion(folder, name)}
    return {**found, **(merged_tokenizer or {})}
