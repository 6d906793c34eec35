"""Files besides weights: allowed names, tokenizer files read within bounds, and a donor's copy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from mergelab.checkpoints.text_file import MAX_TABLE
from mergelab.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["check_file_name", "is_model_folder", "open_tokenizer_file", "put_file"]


_FOLDER = re.compile(r"\d{1,3}_\w{1,60}|additional_chat_templates|abliteration", re.ASCII)
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

    from mergelab.checkpoints.companions import read_companion  # `--help` checks names, and reads no files

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


def is_model_folder(name: str) -> bool:
    """Whether a folder in a model's may be there: a module's, that of more templates, or of a direction."""
    return _FOLDER.fullmatch(name) is not None


def put_file(folder: Path, name: str, content: bytes | Path) -> None:
    """Writes a file of a model folder: bytes, or a copy of a file.

    Args:
        folder: the model's.
        name: one file name, or one in a folder that models have, with a slash: `1_Pooling/config.json`.
        content: what is in it, or where.

    Raises:
        CheckpointError: `name` is not such a name.
        OSError: it cannot be written.
    """
    inner, slash, file = name.partition("/")
    if not slash or not is_model_folder(inner):
        inner, file = "", name
    target = folder / inner / check_file_name(file, "the output")
    target.parent.mkdir(exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        target.write_bytes(content)
