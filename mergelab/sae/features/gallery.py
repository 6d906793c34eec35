"""All that is known of some latents, as data for our page and for Neuronpedia."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mergelab.activations.capture import ModelActivations, halves
from mergelab.sae.features.explanations import Explanation, Match
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

__all__ = ["Gallery", "choose_latents", "explain_gallery", "make_gallery", "neuronpedia_batch", "page_data"]


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
    explained: Mapping[int, tuple[Explanation, Match]] = field(default_factory=dict)
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


_ALIGNED = 3  # coordinates of the residual stream that a latent writes most


def neuronpedia_batch(
    gallery: Gallery,
    sae: SAE,
    words: Callable[[int], str],
    *,
    model_id: str,
    sae_id: str,
    layer: int,
) -> dict[str, Any]:
    """One batch of features.

    Bars are parallel lists of as many heights as values, the values being middles of bins.

    Args:
        gallery: what to write.
        sae: the gallery's.
        words: the text of a token.
        model_id: Neuronpedia's name of the model.
        sae_id: name of the SAE there.
        layer: the site's block.
    """
    return {
        "model_id": model_id,
        "layer": layer,
        "sae_id_suffix": sae_id,
        "features": [_feature(gallery, sae, words, i) for i in range(len(gallery.latents))],
    }


def _feature(gallery: Gallery, sae: SAE, words: Callable[[int], str], i: int) -> dict[str, Any]:
    happened, effects = gallery.activity, gallery.effects
    latent = int(happened.latents[i])
    peak = float(gallery.survey.peak[latent])
    bars = happened.histogram.shape[1]
    written = np.asarray(sae.W_dec[latent], np.float64)
    aligned = np.argsort(-np.abs(written), kind="stable")[:_ALIGNED]
    found: dict[str, Any] = {
        "feature_index": latent,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": _rounded(written[aligned]),
        "neuron_alignment_l1": _rounded(np.abs(written[aligned]) / max(float(np.abs(written).sum()), 1e-12)),
        "correlated_features_indices": happened.neighbors[i].tolist(),
        "correlated_features_pearson": _rounded(happened.likeness[i]),
        "frac_nonzero": round(float(gallery.survey.density[latent]), 8),
        "maxActApprox": round(peak, 6),
        "freq_hist_data_bar_heights": happened.histogram[i].tolist(),
        "freq_hist_data_bar_values": _rounded((np.arange(bars) + 0.5) * peak / bars),
        "decoder_weights_dist": [],
        "activations": [
            {
                "bin_min": 0.0,
                "bin_max": round(peak, 6),
                "bin_contains": 0.0,
                "tokens": [words(token) for token in example.tokens],
                "values": _rounded(np.asarray(example.codes)),
                "qualifying_token_index": int(np.argmax(example.codes)),
            }
            for example in gallery.survey.examples[latent]
        ],
    }
    if effects is None:
        empty = ("pos_str", "pos_values", "neg_str", "neg_values")
        names = (*empty, "logits_hist_data_bar_heights", "logits_hist_data_bar_values")
        return found | {name: [] for name in names}
    edges = effects.edges[i]
    return found | {
        "pos_str": [words(int(token)) for token in effects.top[i]],
        "pos_values": _rounded(effects.top_values[i]),
        "neg_str": [words(int(token)) for token in effects.bottom[i]],
        "neg_values": _rounded(effects.bottom_values[i]),
        "logits_hist_data_bar_heights": effects.histogram[i].tolist(),
        "logits_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
