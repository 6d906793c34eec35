"""Reads the exchanges between chips off the text of a compiled program."""

from __future__ import annotations

import math
import re

__all__ = ["collectives"]

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Kind -> count and bytes of results, from the text of a compiled program.

    An asynchronous operation counts once, at its start, whose result is a tuple of inputs and outputs: the
    largest array of it is what is exchanged.

    >>> text = "%r = f32[8,4]{1,0} all-reduce(%x)\\n%g = (bf16[2], bf16[8]) all-gather-start(%y)"
    >>> collectives(text)
    {'all-reduce': (1, 128), 'all-gather': (1, 16)}
    """
    found: dict[str, tuple[int, int]] = {}
    for shape, kind, start in _OPERATION.findall(program):
        sizes = [
            _width(dtype) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in _ARRAY.findall(shape)
        ]
        nbytes = max(sizes, default=0) if start else sum(sizes)
        count, before = found.get(kind, (0, 0))
        found[kind] = (count + 1, before + nbytes)
    return found


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
