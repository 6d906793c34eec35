"""Meshes as people write them: `data=2,tensor=8`."""

from __future__ import annotations

import re
from typing import Any

import click

from mergelab.errors import quoted

__all__ = ["MESH"]


class _Mesh(click.ParamType):
    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        sizes: dict[str, int] = {}
        for part in value.split(","):
            name, _, size = (text.strip() for text in part.partition("="))
            # As many devices as nine digits say are more than there are.
            if not name.isidentifier() or not re.fullmatch("0{0,8}[1-9][0-9]{0,8}", size) or name in sizes:
                self.fail(
                    f"{quoted(value)} is not a mesh; write each axis once with its size, data=2,tensor=8",
                    param,
                    ctx,
                )
            sizes[name] = int(size)
        return sizes


MESH = _Mesh()
