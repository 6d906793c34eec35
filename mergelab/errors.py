"""Every error mergelab raises on purpose, and the sentence helpers they share.

An error message is one sentence that names the place (file, tensor, field), what was found, what was
expected, and what to do. Callers catch `MergelabError`; the subclasses say whose fault it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import islice

__all__ = [
    "ChatTemplateError",
    "CheckpointError",
    "CorpusError",
    "DecodingError",
    "DependencyError",
    "EvaluationError",
    "MergelabError",
    "MeshError",
    "NonFiniteError",
    "OperatorError",
    "OutputError",
    "RecipeError",
    "SAEError",
    "SearchError",
    "SiteError",
    "TokenError",
    "TuningError",
    "did_you_mean",
    "dotted",
    "first_faults",
    "quoted",
    "shortened",
]

MAX_FAULTS = 20
MAX_MESSAGE = 2000
"""Characters of a whole message: what a person reads, and what a hostile input can make us print."""

MAX_QUOTED = 80


class MergelabError(Exception):
    """Base of all errors that describe bad input or a failed environment, not a bug in mergelab.

    `faults` holds the faults found, one sentence each, at most 20 and 2,000 characters of them (the last
    entry then says how many more there are); the message joins them.
    """

    def __init__(self, faults: str | Iterable[str] = "") -> None:
        self.faults: tuple[str, ...] = first_faults([faults] if isinstance(faults, str) else faults)
        super().__init__("\n".join(self.faults))


class RecipeError(MergelabError):
    """A recipe that cannot be run: unknown key, wrong type, missing model, impossible combination."""


class OperatorError(MergelabError, ValueError):
    """A merge operator was given inputs or parameters for which it has no meaningful result."""


class CheckpointError(MergelabError):
    """A model folder or weight file that is missing, malformed, inconsistent or unsafe to read."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity where finite weights were expected."""


class ChatTemplateError(MergelabError):
    """A chat template that is missing, not valid jinja, refuses its messages, or exceeds its limits."""


class DecodingError(MergelabError, ValueError):
    """A sampler, stop rule, prompt or generation setting for which nothing can be generated."""


class OutputError(MergelabError):
    """The output cannot be written: folder not empty, disk full, resume state that does not match."""


class EvaluationError(MergelabError):
    """An evaluator failed or returned something that is not the declared metrics."""


class SearchError(EvaluationError):
    """A search that found nothing to choose.

    Args:
        message: what it looked for, and how far it came.
        trace: everything that was tried, as plain data.
    """

    def __init__(self, message: str, trace: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.trace: dict[str, object] = dict(trace or {})


class SAEError(MergelabError, ValueError):
    """A sparse autoencoder, its training recipe or its data that do not fit together."""


class CorpusError(SAEError):
    """A text or data set that is missing, damaged, of another kind, or without the field that is read."""


class SiteError(MergelabError, ValueError):
    """A site that the model does not have, or an edit that changes the shape or dtype of an activation."""


class TokenError(MergelabError, ValueError):
    """Token ids that a model has no embedding for, or more tokens than it has positions."""


class TuningError(MergelabError, ValueError):
    """Settings of a fine-tuning without meaning, a text too short for it, or a training that diverged."""


class MeshError(MergelabError, ValueError):
    """Devices, mesh or sharding rules that do not fit together, or a run in which another process failed."""


class DependencyError(MergelabError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `" (did you mean 'density'?)"` for the nearest choice, or `""` when none is near."""
    if len(word) > MAX_QUOTED:  # comparing takes the square of the length, and no name is that long
        return ""
    near = [choice for choice in islice(choices, 10_000) if len(choice) <= 2 * MAX_QUOTED]
    # Capitals and hyphens are the commonest slips, and count for little.
    plain = {_plain(choice): choice for choice in reversed(near)}
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_")


def dotted(path: Iterable[str | int]) -> str:
    """`("models", 1, "parameters")` as `models[1].parameters`."""
    text = ""
    for part in path:
        word = shortened(str(part), MAX_QUOTED)
        text += f"[{word}]" if isinstance(part, int) else f".{word}" if text else word
    return text


def shortened(text: str, limit: int = MAX_QUOTED) -> str:
    """The text with its middle left out if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    return f"{text[: limit - tail - 3]}...{text[len(text) - tail :]}"


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """`repr(value)` of at most `limit` characters, made in time that does not grow with the value."""
    return shortened(_repr(value, limit, 4), limit)


def _repr(value: object, limit: int, depth: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= limit else repr(_cut(value, limit))
    if isinstance(value, int) and value.bit_length() > 3 * limit:
        # Python refuses to write out a number of more than 4,300 digits.
        return f"a number of about {value.bit_length() * 0.30103:.0f} digits"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if depth == 0:
            return "..."
        return _repr_container(value, limit, depth - 1)
    try:
        return repr(value)
    except Exception:  # whatever a caller's own type raises, the message is not about that
        return f"<{type(value).__name__}>"


def _cut(value: str | bytes, limit: int) -> str | bytes:
    """A text or byte string of at most `limit` units, its middle left out."""
    if isinstance(value, str):
        return shortened(value, limit)
    return value[: limit - 3] + b"..."


def _repr_container(value: object, limit: int, depth: int) -> str:
    signs = {list: "[]", tuple: "()"}.get(type(value), "{}")
    parts: list[str] = []
    size = 0
    items = value.items() if isinstance(value, Mapping) else value
    assert isinstance(items, Iterable)
    for item in items:
        if size > limit:
            parts.append("...")
            break
        if isinstance(value, Mapping):
            key, inner = item
            parts.append(f"{_repr(key, limit, depth)}: {_repr(inner, limit, depth)}")
        else:
            parts.append(_repr(item, limit, depth))
        size += len(parts[-1]) + 2
    end = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{signs[0]}{', '.join(parts)}{end}{signs[1]}"


def first_faults(faults: Iterable[str]) -> tuple[str, ...]:
    """The faults that a message shows: at most 20 of 2,000 characters in all, then `and 980 more`."""
    kept: list[str] = []
    size = left = 0
    for fault in faults:
        # What no terminal can show (half a surrogate pair) is written as its escape.
        text = shortened(fault, MAX_MESSAGE - 40).encode("utf-8", "backslashreplace").decode()
        if left or len(kept) == MAX_FAULTS or (kept and size + len(text) + 1 > MAX_MESSAGE - 30):
            left += 1
            continue
        kept.append(text)
        size += len(text) + 1
    return (*kept, f"and {left:,} more") if left else tuple(kept)
