"""Meshes as people write them: `data=2,tensor=8`."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["MESH"]


class _Mesh(click.ParamType):
    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        sizes: dict[str, int] = {}
        for part in value.split(","):
            name, _, size = (text.strip() for text in part.partition("="))
            if not name.isidentifier() or not size.isdigit() or int(size) < 1 or name in sizes:
                self.fail(
                    f"{value!r} is not a mesh; write each axis once with its size, data=2,tensor=8",
                    param,
                    ctx,
                )
            sizes[name] = int(size)
        return sizes


MESH = _Mesh()
