"""JSON read as plain data, strictly: duplicate keys and broken text are errors that name file and line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from mergelab.checkpoints.text_file import MAX_SETTINGS, is_web_page, read_bytes
from mergelab.errors import CheckpointError, quoted, shortened

__all__ = ["parse_json", "parse_json_object", "read_json", "read_json_object", "read_optional_json"]

MAX_DEPTH = 100
_MAX_DIGITS = 300  # what has no more can be made a float64


class _DuplicateKey(ValueError):
    """Two equal keys in one JSON object, of which a lenient parser would silently drop the first."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return data


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _natural(text: str) -> int:
    # "-0" would become a valid size, and no size is negative.
    if text.startswith("-"):
        raise ValueError(f"the number {shortened(text, 40)} is negative")
    return _integer(text)


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {shortened(text, 40)} has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shortened(text, 40)} is beyond the range of float64")
    return value


def _is_deep(data: Any) -> bool:
    """Whether lists and objects nest deeper than what follows (copying, writing) is safe for."""
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def parse_json(raw: bytes, place: str, *, sizes_only: bool = False) -> Any:
    """Returns the plain data of UTF-8 JSON text.

    Args:
        raw: the text; a byte order mark before it is dropped.
        place: what it is, for messages ("config.json", "model.safetensors: the header").
        sizes_only: refuse negative integers, NaN and infinities (a header holds only sizes).

    Raises:
        CheckpointError: not UTF-8, not JSON, a duplicate key, a number beyond float64, or nested deeper than
            100 levels.
    """
    place = shortened(place, 200)
    if is_web_page(raw) or not raw.strip():
        what = "a web page in place of JSON" if raw.strip() else "empty"
        raise CheckpointError(f"{place} is {what}; download or copy the file again")
    try:
        text = raw.decode("utf-8-sig")
        options: dict[str, Any] = {"parse_int": _integer, "parse_float": _float}
        if sizes_only:
            options |= {"parse_int": _natural, "parse_constant": _no_constant}
        data = json.loads(text, object_pairs_hook=_unique, **options)
        if sizes_only or not isinstance(data, dict | list) or not _is_deep(data):
            return data
        message = f"{place} is nested too deeply to be genuine; use another copy of the file"
    except UnicodeDecodeError as error:
        message = f"{place} is not UTF-8 text (byte {error.start}); download or write the file again"
    except json.JSONDecodeError as error:
        message = (
            f"{place} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it"
        )
    except _DuplicateKey as error:
        message = f"{place} has the key {quoted(str(error))} twice in one object; keep one of them"
    except ValueError as error:
        message = f"{place} is not valid JSON: {error}; correct it"
    except RecursionError:
        message = f"{place} is nested too deeply to be genuine; use another copy of the file"
    raise CheckpointError(message)


def parse_json_object(raw: bytes, place: str) -> dict[str, Any]:
    """Returns the object that is UTF-8 JSON text; arguments and errors are those of `parse_json`."""
    data = parse_json(raw, place)
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{shortened(place, 200)} holds a JSON {type(data).__name__} where an object {{...}} was "
            "expected; correct it"
        )
    return data


def read_json(path: Path, limit: int = MAX_SETTINGS) -> Any:
    """Returns what a JSON file holds.

    Raises:
        CheckpointError: the file is not a regular file of at most `limit` bytes, or is not JSON.
    """
    return parse_json(read_bytes(path, limit), str(path))


def read_json_object(path: Path, limit: int = MAX_SETTINGS) -> dict[str, Any]:
    """Returns the object in a JSON file, such as `config.json`.

    Raises:
        CheckpointError: as `read_json`, or the file holds something else than an object.
    """
    return parse_json_object(read_bytes(path, limit), str(path))


def read_optional_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, `{}` if nothing has that name; else as `read_json_object`.

    A folder, a pipe or a link to nothing of that name is refused: it was meant to say something.
    """
    return read_json_object(path) if os.path.lexists(path) else {}
