"""A row of figures for each latent: how often it is active, its norms, and which other points its way."""

from __future__ import annotations

import csv
import io

import numpy as np

from mergelab.activations.model_activations import ModelActivations
from mergelab.sae.activation_functions import is_active
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode_batches

__all__ = ["latent_figures", "latents_csv"]

_BLOCK_NUMBERS = 2**25  # similarities at once: 128 MB


def latent_figures(sae: SAE, source: ModelActivations | None = None) -> dict[str, np.ndarray]:
    """Figures of every latent, each an array `[n_latents]`.

    Args:
        sae: the SAE.
        source: its model on a text, for how often latents are active there.

    Returns:
        Arrays by name: `latent`, its number; `density`, fraction of the tokens that count on which it is
        active, and `mean_active`, its mean activation there, NaN where it never is (both with `source` only);
        `encoder_norm`, `decoder_norm`; `encoder_bias`; `encoder_decoder_cosine` (NaN for other widths);
        `decoder_cosine`, the largest cosine of its decoder row with another's, and `nearest`, that latent.
        A cosine with a row of norm 0 is 0.

    Raises:
        SAEError: the SAE does not fit the source's site.
    """
    arrays = sae.as_numpy()
    encoder, decoder = arrays["W_enc"].T.astype(np.float32), arrays["W_dec"].astype(np.float32)
    found: dict[str, np.ndarray] = {"latent": np.arange(sae.n_latents)}
    if source is not None:
        found |= _activity(sae, source)
    cosine, nearest = _nearest(decoder)
    both = (
        np.einsum("nd,nd->n", _unit(encoder), _unit(decoder))
        if encoder.shape == decoder.shape
        else np.full(sae.n_latents, np.nan)
    )
    return found | {
        "encoder_norm": np.linalg.norm(encoder, axis=1),
        "decoder_norm": np.linalg.norm(decoder, axis=1),
        "encoder_bias": arrays["b_enc"].astype(np.float32),
        "encoder_decoder_cosine": both,
        "decoder_cosine": cosine,
        "nearest": nearest,
    }


def latents_csv(sae: SAE, source: ModelActivations | None = None) -> str:
    """`latent_figures` as CSV with a header; six significant digits."""
    figures = latent_figures(sae, source)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(figures)
    for row in zip(*figures.values(), strict=True):
        table.writerow([int(value) if value.dtype.kind == "i" else f"{value:.6g}" for value in row])
    return text.getvalue()


def _activity(sae: SAE, source: ModelActivations) -> dict[str, np.ndarray]:
    tokens, active, total = 0, np.zeros(sae.n_latents, np.int64), np.zeros(sae.n_latents)
    for codes, kept in encode_batches(sae, source):
        tokens += int(kept.sum())
        active += np.asarray(is_active(codes)).sum(axis=0)
        total += codes.sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"density": active / tokens, "mean_active": total / active}


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest cosine of each row with another one, and that row; 0 and -1 where there is no other."""
    unit, count = _unit(rows), len(rows)
    if count < 2:
        return np.zeros(count, np.float32), np.full(count, -1)
    height = max(1, _BLOCK_NUMBERS // count)
    best, place = np.empty(count, np.float32), np.empty(count, np.int64)
    for start in range(0, count, height):
        alike = unit[start : start + height] @ unit.T
        here = np.arange(len(alike))
        alike[here, start + here] = -np.inf
        place[start : start + height] = alike.argmax(axis=1)
        best[start : start + height] = alike.max(axis=1)
    return best, place
