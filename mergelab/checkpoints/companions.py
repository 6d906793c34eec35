"""The small files of a model, by name: those beside its weights, or those that a GGUF file's metadata make.

Whoever reads a `config.json` or a tokenizer file of a model asks here, so that a model path may be a folder
or a GGUF file: `model.gguf/tokenizer.json` is then the tokenizer that the file describes.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from mergelab.checkpoints.gguf.model_file import GgufModel, is_gguf, open_gguf
from mergelab.checkpoints.gguf.tokenizer import (
    end_ids_from,
    has_tokenizer,
    tokenizer_config_from,
    tokenizer_from,
)
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.text_file import MAX_SETTINGS, read_bytes
from mergelab.errors import CheckpointError

__all__ = ["companion_json", "companion_names", "has_companion", "read_companion"]

_MOST_FILES = 1000
_MADE = ("config.json", "generation_config.json")
_MADE_OF_TOKENS = ("tokenizer.json", "tokenizer_config.json")


def companion_names(model: Path) -> list[str]:
    """Names of the files of a model (and of links that lead nowhere), in order; none if it is not there."""
    if is_gguf(model):
        return [name for name in (*_MADE, *_MADE_OF_TOKENS) if has_companion(model, name)]
    try:
        with os.scandir(model) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_FILES) if not entry.is_dir())
    except OSError:
        return []


def has_companion(model: Path, name: str) -> bool:
    """Whether a model has a file of this name; a folder or a link to nothing of that name counts, too."""
    if not is_gguf(model):
        return os.path.lexists(model / name)
    return name in _MADE or (name in _MADE_OF_TOKENS and has_tokenizer(open_gguf(model).metadata))


def read_companion(model: Path, name: str, limit: int = MAX_SETTINGS) -> bytes:
    """The content of a file of a model.

    Args:
        model: a folder or a GGUF file.
        name: name of the file in a Hugging Face folder.
        limit: bytes that a file of a folder may have.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or a GGUF file does not say enough to make
        it.
    """
    if not is_gguf(model):
        return read_bytes(model / name, limit)
    if not has_companion(model, name):
        raise CheckpointError(f"{model} does not describe a {name}; use the Hugging Face folder of the model")
    opened = open_gguf(model)
    return _made(opened.path, tuple(file.header_sha256 for file in opened.files), name)


def companion_json(model: Path, name: str, limit: int = MAX_SETTINGS) -> dict[str, Any]:
    """The object in a JSON file of a model, `{}` if it has none; errors are those of `read_companion`."""
    if not has_companion(model, name):
        return {}
    return parse_json_object(read_companion(model, name, limit), str(model / name))


@lru_cache(maxsize=8)
def _made(path: Path, headers: tuple[str, ...], name: str) -> bytes:
    del headers  # another file at this path makes other content
    model = open_gguf(path)
    # Without an indent a vocabulary is written many times as fast, and nobody reads one by eye.
    indent = None if name == "tokenizer.json" else 2
    return (json.dumps(_content(model, name), indent=indent, ensure_ascii=False) + "\n").encode()


def _content(model: GgufModel, name: str) -> dict[str, Any]:
    place = str(model.path)
    if name == "config.json":
        return dict(model.config)
    if name == "tokenizer.json":
        return tokenizer_from(model.metadata, place)
    if name == "tokenizer_config.json":
        return tokenizer_config_from(model.metadata)
    ends = end_ids_from(model.metadata)
    found: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    for role in ("bos", "pad"):
        if isinstance(number := model.config.get(f"{role}_token_id"), int):
            found[f"{role}_token_id"] = number
    return found
