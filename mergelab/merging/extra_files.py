"""The files of a model folder besides weights and config: taken from one donor, replaced where merged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mergelab.checkpoints.text_file import MAX_TABLE, read_bytes

__all__ = ["donor_files", "tokenizer_names"]

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

    Raises:
        CheckpointError: a file is a Git LFS pointer.
    """
    names = (*_TEMPLATES, *_OTHER) if merged_tokenizer is not None else (*_TOKENIZER, *_TEMPLATES, *_OTHER)
    found = {name: read_bytes(folder / name, MAX_TABLE) for name in names if os.path.lexists(folder / name)}
    return {**found, **(merged_tokenizer or {})}
