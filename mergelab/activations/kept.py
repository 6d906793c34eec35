"""Which tokens of a model's run count: one rule for training, evaluation, features, steering and stores.

The first token of a context, special tokens, and rows far longer than the others (attention sinks, which a
model puts on its first token and now and then elsewhere) hold nearly all of the variance of a residual stream
and none of its features: on SmolLM2-135M the first token is 139 times as long as the median.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.errors import SAEError

__all__ = [
    "DEFAULT_RULE",
    "EVERY_TOKEN",
    "KeptRows",
    "TokenRule",
    "median_norm",
    "row_norms",
    "sampled_norms",
    "short_enough",
]


@dataclass(frozen=True)
class TokenRule:
    """The tokens that count; the others are neither trained on nor judged, and edits leave them as they are.

    Attributes:
        skip_positions: number of first positions of each context that are left out.
        skip_special: whether special tokens are left out: those that begin, end and fill texts, and the
            markers of chats.
        max_norm_multiple: largest norm of a row that counts, in medians of the norms of the rows that the
            other two keep; None for no limit.

    Raises:
        SAEError: a value is out of range.
    """

    skip_positions: int = 1
    skip_special: bool = True
    max_norm_multiple: float | None = 10.0

    def __post_init__(self) -> None:
        if self.skip_positions < 0:
            raise SAEError(f"skip_positions is {self.skip_positions}; it must be at least 0.")
        if self.max_norm_multiple is not None and not 1 < self.max_norm_multiple < math.inf:
            raise SAEError(
                f"max_norm_multiple is {self.max_norm_multiple}; it must be a finite number above 1, or null "
                "(none) for no limit."
            )

    def by_place(
        self, tokens: np.ndarray, special_ids: Sequence[int] = (), counted: np.ndarray | None = None
    ) -> np.ndarray:
        """Which tokens count as far as their place and their id decide: bool `[contexts, length]`.

        Args:
            tokens: ids `[contexts, length]`.
            special_ids: ids of special tokens.
            counted: bool `[contexts, length]`, False for tokens that never count, such as padding.
        """
        kept = np.broadcast_to(np.arange(tokens.shape[1])[None] >= self.skip_positions, tokens.shape)
        if self.skip_special and len(special_ids):
            kept = kept & ~np.isin(tokens, special_ids)
        return np.ascontiguousarray(kept if counted is None else kept & counted)

    def norm_limit(self, median: float) -> float:
        """The largest norm that counts where the norms have this median; infinite without a limit.

        A median of 0 says nothing of how long rows are.
        """
        return math.inf if self.max_norm_multiple is None or not median else self.max_norm_multiple * median

    def facts(self) -> dict[str, Any]:
        """The rule as plain JSON data, by field."""
        return asdict(self)

    @classmethod
    def of_facts(cls, facts: Any) -> TokenRule | None:
        """The rule that `facts` wrote; None if it is not one."""
        if not isinstance(facts, Mapping) or {one.name for one in fields(cls)} - set(facts):
            return None
        positions, special, multiple = (facts[one.name] for one in fields(cls))
        number = isinstance(multiple, int | float) and not isinstance(multiple, bool)
        if (
            not isinstance(positions, int)
            or not isinstance(special, bool)
            or not (number or multiple is None)
        ):
            return None
        try:
            return cls(positions, special, None if multiple is None else float(multiple))
        except SAEError:
            return None

    def strictest(self, *others: TokenRule | None) -> TokenRule:
        """The rule by which only those tokens count that count by all of these; None says nothing."""
        rules = [self, *(other for other in others if other is not None)]
        multiples = [rule.max_norm_multiple for rule in rules if rule.max_norm_multiple is not None]
        return TokenRule(
            max(rule.skip_positions for rule in rules),
            any(rule.skip_special for rule in rules),
            min(multiples, default=None),
        )


DEFAULT_RULE = TokenRule()
"""The rule where nobody names one."""

EVERY_TOKEN = TokenRule(0, False, None)
"""The rule by which every token counts."""


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Norms of rows `[rows, d]`, float64 `[rows]`, which no float32 row overflows."""
    return np.sqrt(np.einsum("rd,rd->r", rows, rows, dtype=np.float64))


def median_norm(norms: np.ndarray) -> float:
    """The median of norms, those of 0 omitted; 0 where there are no others."""
    there = norms[norms > 0]
    return float(np.median(there)) if len(there) else 0.0


def short_enough(rows: Array, limit: Array | float) -> Array:
    """Whether rows `[..., d]` are at most `limit` long: bool `[...]`, jittable; NaN is, so that it shows."""
    norms = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
    return ~(norms > jnp.asarray(limit, jnp.float32))


_SPANS, _SPAN = 64, 64


def sampled_norms(
    rows: int,
    read: Callable[[int, int], np.ndarray],
    by_place: Callable[[int, int], np.ndarray] | None = None,
) -> np.ndarray:
    """Norms of about 4096 rows, in pieces spread evenly over all: the same for the same rows.

    Args:
        rows: how many there are.
        read: rows from a number to another, `[stop - start, d]`.
        by_place: which of them count as far as their place decides, bool `[stop - start]`; all if None.
    """
    if rows <= _SPANS * _SPAN:
        spans = [(0, rows)]
    else:
        spans = [
            (start, start + _SPAN) for start in np.linspace(0, rows - _SPAN, _SPANS).astype(int).tolist()
        ]
    found = []
    for start, stop in spans:
        norms = row_norms(read(start, stop))
        found.append(norms if by_place is None else norms[by_place(start, stop)])
    return np.concatenate(found)


@dataclass(frozen=True)
class KeptRows:
    """Which rows of a source count.

    Attributes:
        by_place: `(start, stop)` -> bool `[stop - start]`, the rows that count as far as their place decides;
            None for all.
        limit: largest norm of a row that counts.
        target_limit: largest norm of its target, where it has one of its own.
        rule: the rule that this follows; None for rows that have none, such as generated ones.
        context: tokens in a context, where rows are tokens of contexts.
    """

    by_place: Callable[[int, int], np.ndarray] | None = None
    limit: float = math.inf
    target_limit: float = math.inf
    rule: TokenRule | None = None
    context: int | None = None

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers from `start` to `stop` of rows that count by their place."""
        if self.by_place is None:
            return np.arange(start, stop)
        return start + np.flatnonzero(self.by_place(start, stop))

    def counts(self, rows: int, block: int) -> np.ndarray:
        """How many rows count by their place in each block of rows: int64 `[blocks]`."""
        starts = range(0, rows, block)
        if self.by_place is None:
            return np.array([min(block, rows - start) for start in starts], np.int64)
        piece = 64 * block  # few calls, little memory
        found = []
        for start in range(0, rows, piece):
            kept = self.by_place(start, min(start + piece, rows))
            found.append(np.add.reduceat(kept.astype(np.int64), np.arange(0, len(kept), block)))
        return np.concatenate(found)

    def short_enough(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which rows and targets (the same array where they are the rows) are short enough: bool `[rows]`."""
        kept = np.ones(len(x), bool)
        if self.limit < math.inf:
            kept &= row_norms(x) <= self.limit
        if y is not x and self.target_limit < math.inf:
            kept &= row_norms(y) <= self.target_limit
        return kept
