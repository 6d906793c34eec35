"""The page that says what a merge did to its parents' latents: fates, losses, latents with their texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergelab.report.pages import visible

__all__ = ["render_explanation"]

_SIDE = 300
"""Pixels of a plot's side."""


def render_explanation(data: Mapping[str, Any], *, title: str) -> str:
    """The page, in one file; light and dark.

    Args:
        data: what it shows, as JSON (`mergelab.explain.Explanation.to_json`).
        title: the page's heading.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    plots = {one["name"]: _points(one["latents"]) for one in data["specialists"]}
    return environment.get_template("explanation.html").render(
        title=title, data=data, plots=plots, side=_SIDE
    )


def _points(latents: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Places of latents in a plot of the gain in the merge over that in the specialist, both as roots."""
    most = max((one["means"][1] - one["means"][0] for one in latents), default=1.0)
    found = []
    for one in latents:
        base, specialist, merge = one["means"]
        across, up = (specialist - base) / most, (merge - base) / most
        found.append(
            {
                "x": _SIDE * math.sqrt(max(across, 0)),
                "y": _SIDE * (1 - math.copysign(math.sqrt(min(abs(up), 1)), up)),
                "latent": one["latent"],
                "fate": one["fate"],
                "retained": one["retained"],
            }
        )
    return found
