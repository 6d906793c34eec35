"""Latents in the JSON of Neuronpedia: what sae-dashboard's `NeuronpediaDashboardBatch(**data)` takes.

Every field of its classes is there; a list is empty where nothing is measured here (neurons that are
correlated with a latent, and a vector, which is for steering sets).

Source: `sae_dashboard/neuronpedia/neuronpedia_dashboard.py` of sae-dashboard 0.8.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergelab.sae.features.gallery import Gallery
from mergelab.sae.sae import SAE

__all__ = ["neuronpedia_batch"]

_ALIGNED = 3  # coordinates of the residual stream that a latent writes most


def neuronpedia_batch(
    gallery: Gallery,
    sae: SAE,
    words: Callable[[int], str],
    *,
    model_id: str,
    sae_set: str,
    layer: int,
    prompts: tuple[int, int],
    dataset: str = "",
) -> dict[str, Any]:
    """One batch of features.

    Bars are parallel lists of as many heights as values, the values being middles of bins. Of neighbors,
    `l1` is the cosine of the two sets of tokens on which latents are active, and `pearson` their correlation.

    Args:
        gallery: what to write.
        sae: the gallery's.
        words: the text of a token.
        model_id: Neuronpedia's name of the model.
        sae_set: name of the SAE there.
        layer: the site's block.
        prompts: number of contexts, and of tokens in one.
        dataset: name of the text.
    """
    common = {"n_prompts_total": prompts[0], "n_tokens_in_prompt": prompts[1], "dataset": dataset}
    return {
        "model_id": model_id,
        "layer": layer,
        "sae_set": sae_set,
        "sae_id_suffix": None,
        "features": [_feature(gallery, sae, words, i) | common for i in range(len(gallery.latents))],
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
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": happened.neighbors[i].tolist(),
        "correlated_features_l1": _rounded(happened.likeness[i]),
        "correlated_features_pearson": _rounded(_correlations(gallery, i)),
        "frac_nonzero": round(float(gallery.survey.density[latent]), 8),
        "freq_hist_data_bar_heights": happened.histogram[i].tolist(),
        "freq_hist_data_bar_values": _rounded((np.arange(bars) + 0.5) * peak / bars),
        "decoder_weights_dist": [],
        "vector": [],
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


def _correlations(gallery: Gallery, i: int) -> np.ndarray:
    """Pearson's of whether a latent is active with whether its neighbors are: from cosines and densities."""
    density = gallery.survey.density
    own = float(density[gallery.latents[i]])
    other = density[gallery.activity.neighbors[i]]
    product = own * other
    spread = np.sqrt(product * (1 - own) * (1 - other))
    joint = gallery.activity.likeness[i] * np.sqrt(product)
    return np.where(spread > 0, (joint - product) / np.where(spread > 0, spread, 1), 0)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
