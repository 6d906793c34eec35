"""Generated scratchpads: sums worked out step by step, some with a slip, and which steps are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.errors import TuningError

__all__ = ["Scratchpads", "generate_scratchpads"]


@dataclass(frozen=True)
class Scratchpads:
    """Worked sums of digits, modulo a base, as token ids; all of one length.

    A row is the digits, `=`, for each step `total + digit = total ;`, then `A`, the answer and the end.

    Attributes:
        tokens: int32 `[rows, length]`.
        right: bool `[rows]`, whether the answer is.
        ends: columns at which steps end, int `[steps]`.
        steps_right: bool `[rows, steps]`, whether the total after each step is that of the digits so far.
        vocabulary: texts of the token ids.
    """

    tokens: np.ndarray
    right: np.ndarray
    ends: np.ndarray
    steps_right: np.ndarray
    vocabulary: tuple[str, ...]


def generate_scratchpads(
    rows: int, *, digits: int = 4, base: int = 5, slips: float = 0.5, seed: int = 0
) -> Scratchpads:
    """Draws sums and works them out; a slip adds a number to one total, and the row goes on from there.

    Args:
        rows: number of rows.
        digits: how many are added up, at least 2.
        base: totals are kept modulo this, at least 2; tokens 0 to `base - 1` are the digits.
        slips: fraction of the rows that have one.
        seed: seed of everything drawn.

    Raises:
        TuningError: an argument is out of range.
    """
    if rows < 1 or digits < 2 or base < 2 or not 0 <= slips <= 1:
        raise TuningError(
            f"scratchpads of {rows} rows, {digits} digits, base {base} and slips {slips} cannot be drawn; "
            "expected at least 1, 2 and 2, and a fraction."
        )
    rng = np.random.default_rng(seed)
    equals, plus, ends, answer, end = range(base, base + 5)
    numbers = rng.integers(0, base, (rows, digits))
    place = rng.integers(0, digits - 1, rows)
    size = np.where(rng.random(rows) < slips, rng.integers(1, base, rows), 0)
    steps = np.arange(digits - 1)
    truth = np.cumsum(numbers, axis=1)[:, 1:] % base
    totals = (truth + np.where(steps[None] >= place[:, None], size[:, None], 0)) % base
    before = np.concatenate([numbers[:, :1], totals[:, :-1]], axis=1)
    said = [
        piece for n in steps for piece in (before[:, n], plus, numbers[:, n + 1], equals, totals[:, n], ends)
    ]
    columns = [*numbers.T, equals, *said, answer, totals[:, -1], end]
    tokens = np.stack([np.broadcast_to(column, rows) for column in columns], axis=1).astype(np.int32)
    names = (*map(str, range(base)), "=", "+", ";", "A", "</s>")
    return Scratchpads(tokens, totals[:, -1] == truth[:, -1], digits + 6 + 6 * steps, totals == truth, names)
