"""JSON read as plain data, strictly: duplicate keys and broken text are errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergelab.checkpoints.lfs import refuse_pointer
from mergelab.errors import CheckpointError

__all__ = ["parse_json", "read_json_object"]


class _DuplicateKey(ValueError):
    """Two equal keys in one JSON object, of which a lenient parser would silently drop the first."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return data


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _natural(text: str) -> int:
    # "-0" would become a valid size, and no size is negative.
    if text.startswith("-"):
        raise ValueError(f"the number {text} is negative")
    return int(text)


def parse_json(raw: bytes, place: str, *, sizes_only: bool = False) -> Any:
    """Returns the plain data of UTF-8 JSON text.

    Args:
        raw: the text.
        place: what it is, for messages ("config.json", "model.safetensors: the header").
        sizes_only: refuse negative integers, NaN and infinities (a header holds only sizes).

    Raises:
        CheckpointError: not UTF-8, not JSON, a duplicate key, nested too deeply, or a Git LFS pointer.
    """
    refuse_pointer(raw, place)
    try:
        text = raw.decode("utf-8")
        options: dict[str, Any] = (
            {"parse_int": _natural, "parse_constant": _no_constant} if sizes_only else {}
        )
        return json.loads(text, object_pairs_hook=_unique, **options)
    except UnicodeDecodeError as error:
        message = f"{place} is not UTF-8 text (byte {error.start}); download or write the file again"
    except json.JSONDecodeError as error:
        message = (
            f"{place} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it"
        )
    except _DuplicateKey as error:
        message = f"{place} has the key {str(error)!r} twice in one object; keep one of them"
    except ValueError as error:
        message = f"{place} is not valid JSON: {error}; correct it"
    except RecursionError:
        message = f"{place} is nested too deeply to be genuine; use another copy of the file"
    raise CheckpointError(message)


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, such as `config.json`.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    data = parse_json(raw, str(path))
    if not isinstance(data, dict):
        message = (
            f"{path} holds a JSON {type(data).__name__} where an object {{...}} was expected; correct it"
        )
        raise CheckpointError(message)
    return data
