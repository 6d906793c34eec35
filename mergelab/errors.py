"""Every error mergelab raises on purpose, and the sentence helpers they share.

An error message is one sentence that names the place (file, tensor, field), what was found, what was
expected, and what to do. Callers catch `MergelabError`; the subclasses say whose fault it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ChatTemplateError",
    "CheckpointError",
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
    "SiteError",
    "TokenError",
    "did_you_mean",
]


class MergelabError(Exception):
    """Base of all errors that describe bad input or a failed environment, not a bug in mergelab."""


class RecipeError(MergelabError):
    """A recipe that cannot be run: unknown key, wrong type, missing model, impossible combination.

    `faults` holds every fault found, one sentence each; the message joins them.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


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


class SAEError(MergelabError, ValueError):
    """A sparse autoencoder, its training recipe or its data that do not fit together."""


class SiteError(MergelabError, ValueError):
    """A site that the model does not have, or an edit that changes the shape or dtype of an activation."""


class TokenError(MergelabError, ValueError):
    """Token ids that a model has no embedding for, or more tokens than it has positions."""


class MeshError(MergelabError, ValueError):
    """Devices, mesh or sharding rules that do not fit together, or a run in which another process failed."""


class DependencyError(MergelabError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `" (did you mean 'density'?)"` for the nearest choice, or `""` when none is near."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
