"""Numbers on the command line, each checked in one place: seeds, whole numbers and fractions with bounds."""

from __future__ import annotations

import hashlib
import math
from typing import Any, cast

import click

from mergelab.errors import shortened

__all__ = ["ANY_NUMBER", "SEED", "Number", "Seed", "WholeNumber"]

_MOST = 2**31 - 1  # counts and sizes become 32-bit integers of arrays
_MAX_DIGITS = 1000


class Seed(click.ParamType):
    """A whole number of up to 1,000 digits; what a generator cannot take is folded into 62 bits.

    A seed that fits stays what it is, so that what was drawn with it is drawn again.

    Args:
        low: the least seed; None where any will do.
        fold: fold seeds that do not fit into 63 bits; otherwise they are passed on as they are.
    """

    name = "integer"

    def __init__(self, low: int | None = None, *, fold: bool = True) -> None:
        self.low, self.fold = low, fold

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        try:
            seed = int(text) if len(text) <= _MAX_DIGITS else None
        except ValueError:
            seed = None
        if seed is None:
            self.fail(f"{shortened(text)!r} is not a seed; write a whole number such as 7", param, ctx)
        if self.low is not None and seed < self.low:
            self.fail(f"{shortened(text)} is not in the range x>={self.low}.", param, ctx)
        # A little below 2**63: seeds of related draws are made by adding to this one.
        if not self.fold or -(2**63) <= seed < 2**63 - 2**32:
            return seed
        return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") >> 2


SEED = Seed()


class WholeNumber(click.IntRange):
    """`click.IntRange` that takes no more than fits an array's index, and names a long value shortly."""

    def __init__(self, low: int | None = None, most: int = _MOST) -> None:
        super().__init__(low)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value) if isinstance(value, str | int) else ""
        if len(text) > 19 or (text.lstrip("+-").isdecimal() and abs(int(text)) > self.most):
            self.fail(f"{shortened(text)} is beyond {self.most:,}, the most there can be.", param, ctx)
        return super().convert(cast("Any", value), param, ctx)


class Number(click.FloatRange):
    """`click.FloatRange` without NaN, which compares as neither too small nor too large, and infinity."""

    bounded = True

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and len(value) > 100:
            self.fail(f"{shortened(value)!r} is not a number; write a shorter one", param, ctx)
        number = super().convert(cast("Any", value), param, ctx)
        if math.isnan(number) or (self.bounded and math.isinf(number)):
            self.fail(f"{value} is not a number that can be used; write a finite one", param, ctx)
        return number


class _AnyNumber(Number):
    """A number without bounds; infinity stands for no limit."""

    name = "float"
    bounded = False


ANY_NUMBER = _AnyNumber()
