"""HTML pages in one file each: the report of a comparison, and an SAE's features."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from mergelab.report.comparison import ComparedScore, Comparison, in_reading_order, score_figure, svg
from mergelab.sae.features.gallery import Gallery

__all__ = ["page_data", "render_features", "render_page"]


def render_page(comparison: Comparison, title: str, recipes: Mapping[str, str]) -> str:
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


def _data_uri(comparison: Comparison, *, dark: bool) -> str:
    text = svg(score_figure(comparison, dark=dark))
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def _description(scores: list[ComparedScore]) -> str:
    """What the figure shows, for those who cannot see it."""
    means = ", ".join(f"{score.name} {score.mean:.3f}" for score in scores)
    return f"Dot plot of bits per byte by domain; the means are {means}."


_STEPS = 99  # activations are shown as parts of the latent's peak, in so many steps


def render_features(
    gallery: Gallery, words: Callable[[int], str], *, title: str, facts: Mapping[str, str]
) -> str:
    """The page; light and dark, and it works from a file.

    Its address keeps the view: `page.html#q=text&sort=peak&latent=7`.

    Args:
        gallery: what it shows.
        words: the text of a token.
        title: the page's heading.
        facts: what else is said at its head, by name, in order.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergelab.report"), autoescape=True, undefined=StrictUndefined
    )
    # Within a script element nothing but these could end it.
    text = json.dumps(page_data(gallery, words), ensure_ascii=False, separators=(",", ":"))
    data = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.get_template("features.html").render(title=title, facts=facts, data=data)


def page_data(gallery: Gallery, words: Callable[[int], str]) -> dict[str, Any]:
    """What the page's script reads.

    Texts stand once: `words` by token, `contexts` as tokens; an example is a context and its activations in
    hundredths of the latent's peak, runs of zeros left out: `[place, value, place, value, ...]`.
    """
    contexts: dict[int, tuple[int, ...]] = {}
    features: list[dict[str, Any]] = []
    happened, effects = gallery.activity, gallery.effects
    used: set[int] = set()
    for i, latent in enumerate(happened.latents.tolist()):
        peak = float(gallery.survey.peak[latent])
        examples = []
        for example in gallery.survey.examples[latent]:
            contexts[example.context] = example.tokens
            marks = [(at, round(_STEPS * code / peak)) for at, code in enumerate(example.codes) if code > 0]
            examples.append([example.context, [number for mark in marks for number in mark]])
        feature: dict[str, Any] = {
            "i": latent,
            "density": _short(gallery.survey.density[latent]),
            "peak": _short(peak),
            "mean": _short(happened.mean[i]),
            "bars": happened.histogram[i].tolist(),
            "near": [
                [int(n), _short(v)]
                for n, v in zip(happened.neighbors[i], happened.likeness[i], strict=True)
                if v > 0
            ],
            "examples": examples,
        }
        if effects is not None:
            for name, tokens, values in (
                ("up", effects.top[i], effects.top_values[i]),
                ("down", effects.bottom[i], effects.bottom_values[i]),
            ):
                feature[name] = [[int(t), _short(v)] for t, v in zip(tokens, values, strict=True)]
                used |= {int(t) for t in tokens}
        if latent in gallery.explained:
            explanation, match = gallery.explained[latent]
            feature["patterns"] = [[list(p.tokens), list(p.after)] for p in explanation.patterns]
            used |= {t for p in explanation.patterns for t in (*p.tokens, *p.after) if t is not None}
            # NaN is no JSON.
            feature["precision"] = _short(match.precision) if match.precision == match.precision else None
            feature["recall"] = _short(match.recall) if match.recall == match.recall else None
        if gallery.children:
            children = gallery.children.get(latent, ())
            feature["splits"] = len(children)
            feature["children"] = [[c.latent, _short(c.cosine), list(c.tokens)] for c in children]
            used |= {token for child in children for token in child.tokens}
        features.append(feature)
    used |= {token for tokens in contexts.values() for token in tokens}
    return {
        "site": gallery.site,
        "rows": gallery.survey.rows,
        "words": {token: words(token) for token in sorted(used)},
        "contexts": {number: list(tokens) for number, tokens in sorted(contexts.items())},
        "features": features,
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
