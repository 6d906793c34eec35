"""How well a decoder's rows recover known features: cosines with the nearest row, and one-to-one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.errors import SAEError

__all__ = ["Recovery", "matched_cosine", "max_cosines", "recovery"]

_PIECE = 1024  # features that are compared with all rows at a time


@dataclass(frozen=True)
class Recovery:
    """Recovery of true features.

    Attributes:
        mean_max_cosine: over the true features, the mean cosine with the nearest row of the decoder.
        above: the part of them whose nearest row has a cosine above .9.
    """

    mean_max_cosine: float
    above: float


def recovery(features: np.ndarray, decoder: np.ndarray, threshold: float = 0.9) -> Recovery:
    """Compares a decoder with the truth; several features may have the same nearest row.

    Args:
        features: `[n_features, d]`, of any norm above 0.
        decoder: `[n_latents, d]`; rows of norm 0 point nowhere and have cosine 0.
        threshold: the cosine that `above` counts from.

    Raises:
        SAEError: the widths differ, or a feature has norm 0.
    """
    nearest = max_cosines(features, decoder)
    return Recovery(float(nearest.mean()), float((nearest > threshold).mean()))


def max_cosines(features: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """The cosine of each feature with the nearest row of the decoder: `[n_features]`, float32."""
    truth, rows = _directions(features, decoder)
    pieces = [truth[start : start + _PIECE] @ rows.T for start in range(0, len(truth), _PIECE)]
    return np.concatenate([piece.max(axis=1) for piece in pieces])


def matched_cosine(features: np.ndarray, decoder: np.ndarray) -> float:
    """Mean cosine under the best assignment in which no row stands for two features (often called MCC).

    Where there are fewer rows than features, only as many features as there are rows count.

    Raises:
        SAEError: the widths differ, or a feature has norm 0.
    """
    from scipy.optimize import linear_sum_assignment

    truth, rows = _directions(features, decoder)
    cosines = truth @ rows.T
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def _directions(features: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if features.ndim != 2 or decoder.ndim != 2 or features.shape[1] != decoder.shape[1]:
        raise SAEError(
            f"features of shape {list(features.shape)} cannot be compared with a decoder of shape "
            f"{list(decoder.shape)}; expected [n_features, d] and [n_latents, d]."
        )
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise SAEError(
            f"feature {int(np.argmin(norms))} has norm 0, so nothing can recover it; leave it out."
        )
    lengths = np.linalg.norm(decoder, axis=1, keepdims=True)
    rows = decoder / np.where(lengths > 0, lengths, 1)
    return (features / norms).astype(np.float32), rows.astype(np.float32)
