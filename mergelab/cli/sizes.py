"""Byte counts as people write and read them: `5GB`, `512MiB`, `1.5 GB`."""

from __future__ import annotations

import re
from typing import Any

import click

from mergelab.errors import quoted

__all__ = ["SIZE", "readable"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
}


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value) if len(value) < 60 else None
        if match is None or match[2].upper() not in _UNITS:
            self.fail(f"{quoted(value)} is not a size; write 5GB, 512MiB or a number of bytes", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size >= 2**63:
            self.fail(f"{value!r} is more than any disk holds; write a size such as 5GB", param, ctx)
        if size < 1:
            self.fail(f"{value!r} is no bytes at all; write a size such as 5GB", param, ctx)
        return size


SIZE = _Size()


def readable(count: float) -> str:
    """`1234567` as `1.23 MB`, with decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
