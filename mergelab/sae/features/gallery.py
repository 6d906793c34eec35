"""All that is known of some latents, as data for our page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mergelab.activations.model_activations import ModelActivations, halves
from mergelab.sae.features.explanations import LatentExplanation, Match
from mergelab.sae.features.logit_effects import LogitEffects, logit_effects, writes_stream
from mergelab.sae.features.matching import Child
from mergelab.sae.features.n2g import explain, match_explanations
from mergelab.sae.features.survey import (
    Activity,
    CodeStore,
    StoredCodes,
    Strengths,
    StrongestContexts,
    Survey,
    activity,
    read_codes,
    survey,
)
from mergelab.sae.sae import SAE

__all__ = ["Gallery", "choose_latents", "explain_gallery", "make_gallery", "page_data"]


@dataclass(frozen=True)
class Gallery:
    """What was found of some latents on a text.

    Attributes:
        site: where the SAE reads.
        survey: densities, peaks, and each latent's strongest contexts.
        activity: histograms and neighbors, of the latents shown.
        effects: effects on logits of the same latents in the same order; None where there are none.
        explained: N2G explanations of some of them, with precision and recall on text they are not made of.
        children: what some of them have become in a wider SAE (`hierarchy`).
    """

    site: str
    survey: Survey
    activity: Activity
    effects: LogitEffects | None
    explained: Mapping[int, tuple[LatentExplanation, Match]] = field(default_factory=dict)
    children: Mapping[int, tuple[Child, ...]] = field(default_factory=dict)

    @property
    def latents(self) -> np.ndarray:
        """`[m]`, the latents shown."""
        return self.activity.latents


def choose_latents(density: np.ndarray, most: int) -> np.ndarray:
    """The latents active at all: if more than `most`, that many at equal steps in the order of density.

    Args:
        density: `[n_latents]`.
        most: maximum number of latents, at least 1.

    Returns:
        Their numbers, rising.
    """
    order = np.argsort(-density, kind="stable")
    order = order[: int((density > 0).sum())]
    if len(order) > most:
        order = order[np.linspace(0, len(order) - 1, most).round().astype(np.int64)]
    return np.sort(order)


def make_gallery(
    sae: SAE,
    source: ModelActivations,
    *,
    most: int = 2000,
    examples: int = 8,
    latents: Sequence[int] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Gallery:
    """Gathers it in one pass of the model over the text; what must wait for it reads the codes that it kept.

    Args:
        sae: SAE that reads the first of the source's sites.
        source: model and text.
        most: number of latents shown, at most.
        examples: number of contexts per latent.
        latents: those to show; by default `choose_latents`.
        progress: function of the stage (`text`, then `codes`), its contexts done and their total.

    Raises:
        SAEError: the SAE does not fit the site.
    """
    total, length = source.tokens.shape
    strengths = Strengths(sae.n_latents)
    with CodeStore() as store:
        for codes in read_codes(sae, source, progress=partial(progress, "text")):
            strengths.add(codes)
            store.add(codes)
        density, peak = strengths.density(), strengths.peak
        chosen = choose_latents(density, most) if latents is None else np.asarray(sorted(latents), np.int64)
        strongest = StrongestContexts(sae.n_latents, chosen.tolist(), examples, source.tokens)

        def again() -> Iterator[StoredCodes]:
            for codes in store:
                strongest.add(codes)
                yield codes
                progress("codes", codes.first + codes.contexts, total)

        happened = activity(again(), chosen, peak, length)
    seen = Survey(strengths.rows, density, peak, strongest.examples())
    causal = source.model.predicts
    reaches = causal and len(chosen) > 0 and writes_stream(sae, source)
    effects = logit_effects(sae, source, chosen) if reaches else None
    return Gallery(source.sites[0], seen, happened, effects)


def explain_gallery(
    gallery: Gallery, sae: SAE, source: ModelActivations, *, count: int, mask_token: int
) -> Gallery:
    """The gallery with explanations of its `count` latents of highest peak.

    They are made of the first half of the text and judged on the second.

    Raises:
        SAEError: the text has one context.
    """
    order = np.argsort(-gallery.survey.peak[gallery.latents], kind="stable")[:count]
    chosen = gallery.latents[order].tolist()
    fit, judge = halves(source)
    found = survey(sae, fit, count=8, latents=chosen).examples
    made = explain(sae, fit, found, mask_token=mask_token)
    matches = match_explanations(sae, judge, list(made.values()))
    explained = dict(zip(made, zip(made.values(), matches, strict=True), strict=True))
    return replace(gallery, explained=explained)


_STEPS = 99  # a page shows activations in this many steps of the latent's peak


def page_data(gallery: Gallery, words: Callable[[int], str]) -> dict[str, Any]:
    """What the script of `mergelab.report.pages.render_features` reads: plain data, for JSON.

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
            # JSON has no NaN.
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
