"""One `tokenizer.json` opened: bounded, and whatever the tokenizers package raises as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.checkpoints.text_file import MAX_TABLE, read_text
from mergelab.errors import CheckpointError, shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["open_tokenizer_file"]


def open_tokenizer_file(path: Path) -> Tokenizer:
    """Returns the tokenizer that a `tokenizer.json` describes, as the tokenizers package makes it.

    Raises:
        CheckpointError: the file is no regular file of at most 256 MiB, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    text = read_text(path, MAX_TABLE)
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises bare Exception, and panics past it
        raise CheckpointError(
            f"{path} is not a tokenizer.json as the tokenizers package writes it "
            f"({shortened(str(error), 200)}); copy it again."
        ) from error
