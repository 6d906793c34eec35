"""HTML pages in one file each: the report of a comparison, and an SAE's features."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from mergelab.report.comparison import (
    ComparedScore,
    ScoredModels,
    change_of,
    in_reading_order,
    score_figure,
    svg,
)

__all__ = ["render_features", "render_page", "visible"]


def render_page(comparison: ScoredModels, title: str, recipes: Mapping[str, str]) -> str:
    """The page: verdict, figure, table, recipes, and where the numbers come from; light and dark.

    Args:
        comparison: the results.
        title: the page's heading.
        recipes: text of every recipe by name.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = in_reading_order(comparison)
    domains = list(comparison.domains)
    environment.filters["visible"] = visible
    environment.filters["change"] = change_of
    return environment.get_template("comparison.html").render(
        title=title,
        comparison=comparison,
        domains=domains,
        scores=scores,
        best={**{d: min(s.bits[d] for s in scores) for d in domains}, "mean": min(s.mean for s in scores)},
        recipes=recipes,
        figures={side: _data_uri(comparison, dark=side == "dark") for side in ("light", "dark")},
        description=_description(scores),
        total_seconds=sum(comparison.seconds.values()),
    )


def visible(text: str) -> str:
    """White space that a reader sees, on one line; as `shown` of `features.js`."""
    text = text.replace("\n", "↵").replace("\t", "→")
    return re.sub(" {4,}", lambda run: f"␣×{len(run[0])} ", text)


def _data_uri(comparison: ScoredModels, *, dark: bool) -> str:
    text = svg(score_figure(comparison, dark=dark))
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def _description(scores: list[ComparedScore]) -> str:
    """What the figure shows, for those who cannot see it."""
    means = ", ".join(f"{score.name} {score.mean:.3f}" for score in scores)
    return f"Dot plot of bits per byte by domain; the means are {means}."


def render_features(data: Mapping[str, Any], *, title: str, facts: Mapping[str, str]) -> str:
    """The page; light and dark, and it works from a file.

    Its address keeps the view: `page.html#q=text&sort=peak&latent=7`.

    Args:
        data: what it shows, as JSON (`mergelab.sae.features.gallery.page_data`).
        title: the page's heading.
        facts: what else is said at its head, by name, in order.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"), autoescape=True, undefined=StrictUndefined
    )
    # Within a script element nothing but these could end it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.get_template("features.html").render(title=title, facts=facts, data=safe)
