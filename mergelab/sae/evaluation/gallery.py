"""Everything that is known of a choice of latents, gathered: what a page or an export shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.activity import Activity, activity
from mergelab.sae.evaluation.examples import Survey, survey
from mergelab.sae.evaluation.hierarchy import Child
from mergelab.sae.evaluation.logit_effects import LogitEffects, logit_effects, writes_stream
from mergelab.sae.evaluation.n2g import explain, match_explanations
from mergelab.sae.evaluation.patterns import Explanation, Match
from mergelab.sae.evaluation.scorecard import halves

__all__ = ["Gallery", "choose_latents", "explain_gallery", "make_gallery"]


@dataclass(frozen=True)
class Gallery:
    """What was found of some latents on a text.

    Attributes:
        site: where the dictionary reads.
        survey: densities, peaks, and each latent's strongest contexts.
        activity: histograms and neighbours, of the latents shown.
        effects: on logits, of the same latents in the same order; None where there are none.
        explained: N2G explanations of some of them, with precision and recall on text they are not made of.
        children: of some of them, what they have become in a wider dictionary (`hierarchy`).
    """

    site: str
    survey: Survey
    activity: Activity
    effects: LogitEffects | None
    explained: Mapping[int, tuple[Explanation, Match]] = field(default_factory=dict)
    children: Mapping[int, tuple[Child, ...]] = field(default_factory=dict)

    @property
    def latents(self) -> np.ndarray:
        """`[m]`, the latents shown."""
        return self.activity.latents


def choose_latents(density: np.ndarray, most: int) -> np.ndarray:
    """The latents active at all: if there are more than `most`, every so-manieth in the order of density.

    Args:
        density: `[n_latents]`.
        most: at least 1.

    Returns:
        Their numbers, rising.
    """
    order = np.argsort(-density, kind="stable")
    order = order[: int((density > 0).sum())]
    if len(order) > most:
        order = order[np.linspace(0, len(order) - 1, most).round().astype(np.int64)]
    return np.sort(order)


def make_gallery(
    dictionary: Dictionary,
    source: ModelActivations,
    *,
    most: int = 2000,
    examples: int = 8,
    latents: Sequence[int] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Gallery:
    """Gathers it in three passes over the text.

    Args:
        dictionary: reads the first of the source's sites.
        source: model and text.
        most: latents shown.
        examples: contexts per latent.
        latents: those to show; by default `choose_latents`.
        progress: is told the pass over the text, its contexts done and in all.

    Raises:
        SAEError: the dictionary does not fit the site.
    """
    if latents is None:
        density = survey(dictionary, source, latents=[], progress=partial(progress, "density")).density
        chosen = choose_latents(density, most)
    else:
        chosen = np.asarray(sorted(latents), np.int64)
    seen = survey(
        dictionary, source, count=examples, latents=chosen.tolist(), progress=partial(progress, "examples")
    )
    happened = activity(dictionary, source, chosen, seen.peak, progress=partial(progress, "activity"))
    causal = source.model.family.architecture.causal
    reaches = causal and len(chosen) > 0 and writes_stream(dictionary, source)
    effects = logit_effects(dictionary, source, chosen) if reaches else None
    return Gallery(source.sites[0], seen, happened, effects)


def explain_gallery(
    gallery: Gallery, dictionary: Dictionary, source: ModelActivations, *, count: int, mask_token: int
) -> Gallery:
    """The gallery with explanations of its `count` latents of highest peak.

    They are made of the first half of the text and judged on the second.

    Raises:
        SAEError: the text has one context.
    """
    order = np.argsort(-gallery.survey.peak[gallery.latents], kind="stable")[:count]
    chosen = gallery.latents[order].tolist()
    fit, judge = halves(source)
    found = survey(dictionary, fit, count=8, latents=chosen).examples
    made = explain(dictionary, fit, found, mask_token=mask_token)
    matches = match_explanations(dictionary, judge, list(made.values()))
    explained = dict(zip(made, zip(made.values(), matches, strict=True), strict=True))
    return replace(gallery, explained=explained)
