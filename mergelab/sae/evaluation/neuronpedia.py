"""A gallery in the JSON shape of Neuronpedia's feature batches (as SAEDashboard writes them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.gallery import Gallery

__all__ = ["neuronpedia_batch"]

_ALIGNED = 3  # coordinates of the residual stream that a latent writes most


def neuronpedia_batch(
    gallery: Gallery,
    dictionary: Dictionary,
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
        dictionary: the gallery's.
        words: the text of a token.
        model_id: as Neuronpedia knows the model.
        sae_id: name of the dictionary there.
        layer: the site's block.
    """
    return {
        "model_id": model_id,
        "layer": layer,
        "sae_id_suffix": sae_id,
        "features": [_feature(gallery, dictionary, words, i) for i in range(len(gallery.latents))],
    }


def _feature(gallery: Gallery, dictionary: Dictionary, words: Callable[[int], str], i: int) -> dict[str, Any]:
    happened, effects = gallery.activity, gallery.effects
    latent = int(happened.latents[i])
    peak = float(gallery.survey.peak[latent])
    bars = happened.histogram.shape[1]
    written = np.asarray(dictionary.W_dec[latent], np.float64)
    aligned = np.argsort(-np.abs(written), kind="stable")[:_ALIGNED]
    found: dict[str, Any] = {
        "feature_index": latent,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": _rounded(written[aligned]),
        "neuron_alignment_l1": _rounded(np.abs(written[aligned]) / max(float(np.abs(written).sum()), 1e-12)),
        "correlated_features_indices": happened.neighbours[i].tolist(),
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
