"""Which latents of two dictionaries are the same feature, and into what a feature splits in a wider one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergelab.errors import SAEError
from mergelab.sae.dictionary import Dictionary

__all__ = ["FeatureMatch", "SeedSpread", "feature_splits", "match_features", "shared_features"]

_EXACT = 4096  # up to so many latents the assignment is optimal: the algorithm is cubic
_PIECE = 1024


@dataclass(frozen=True)
class FeatureMatch:
    """For each latent of the first dictionary, its match in the second.

    Attributes:
        latent: `[n]`, int64; -1 where one-to-one matching left none over.
        cosine: `[n]`, float32, of the decoder directions; 0 where there is no match.
    """

    latent: np.ndarray
    cosine: np.ndarray

    def share_above(self, threshold: float) -> float:
        """The part of the latents whose match is more alike than this."""
        return float((self.cosine > threshold).mean())


def match_features(one: Dictionary, other: Dictionary, *, one_to_one: bool = True) -> FeatureMatch:
    """Pairs latents by the cosine of what they write.

    Trainings with the same seed begin from the same directions, latent by latent, whatever their width:
    compare such of different seeds.

    One-to-one pairs maximise the sum of cosines (Hungarian algorithm) for at most 4096 latents; beyond, they
    are taken greedily from the most alike pair of each row on. Otherwise every latent has its nearest.

    Args:
        one: a dictionary.
        other: another of the same site.
        one_to_one: no latent of the second stands for two of the first.

    Raises:
        SAEError: they write different widths.
    """
    a, b = _directions(one), _directions(other)
    if a.shape[1] != b.shape[1]:
        raise SAEError(f"the dictionaries write {a.shape[1]} and {b.shape[1]} wide; give two of one site.")
    if not one_to_one:
        return _nearest(a, b)
    if max(len(a), len(b)) > _EXACT:
        return _greedy(a, b)
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.T
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    latent, cosine = np.full(len(a), -1), np.zeros(len(a), np.float32)
    latent[rows], cosine[rows] = columns, cosines[rows, columns]
    return FeatureMatch(latent, cosine)


def _directions(dictionary: Dictionary) -> np.ndarray:
    rows = np.asarray(dictionary.W_dec, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _nearest(a: np.ndarray, b: np.ndarray) -> FeatureMatch:
    latent, cosine = np.zeros(len(a), np.int64), np.zeros(len(a), np.float32)
    for start in range(0, len(a), _PIECE):
        piece = slice(start, start + _PIECE)
        cosines = a[piece] @ b.T
        latent[piece], cosine[piece] = cosines.argmax(axis=1), cosines.max(axis=1)
    return FeatureMatch(latent, cosine)


def _greedy(a: np.ndarray, b: np.ndarray) -> FeatureMatch:
    """Rounds: every free latent asks its nearest free one, which takes the most alike of those that ask."""
    latent, cosine = np.full(len(a), -1), np.zeros(len(a), np.float32)
    free_a, free_b = np.arange(len(a)), np.arange(len(b))
    while len(free_a) and len(free_b):
        near = _nearest(a[free_a], b[free_b])
        order = np.argsort(-near.cosine, kind="stable")
        _, first = np.unique(near.latent[order], return_index=True)
        won = order[first]
        latent[free_a[won]], cosine[free_a[won]] = free_b[near.latent[won]], near.cosine[won]
        free_b = np.delete(free_b, near.latent[won])
        free_a = np.delete(free_a, won)
    return FeatureMatch(latent, cosine)


def feature_splits(narrow: Dictionary, wide: Dictionary, *, threshold: float = 0.5) -> dict[int, list[int]]:
    """Which latents of a wider dictionary each latent of a narrow one has become.

    A latent of the wide one is a child of the nearest of the narrow one, if their cosine is above the
    threshold: a hierarchy in which a feature with two or more children has split.

    Args:
        narrow: a dictionary.
        wide: another of the same site, with more latents.
        threshold: least cosine of parent and child.

    Returns:
        By latent of the narrow one its children, the most alike first; those without any are left away.

    Raises:
        SAEError: they write different widths.
    """
    up = match_features(wide, narrow, one_to_one=False)
    children: dict[int, list[int]] = {}
    for child in np.argsort(-up.cosine, kind="stable").tolist():
        if up.cosine[child] > threshold:
            children.setdefault(int(up.latent[child]), []).append(child)
    return dict(sorted(children.items()))


@dataclass(frozen=True)
class SeedSpread:
    """How much of a dictionary another seed finds again.

    Attributes:
        mean_cosine: of the one-to-one matches.
        shared: the part of the latents whose match has a cosine above the threshold.
    """

    mean_cosine: float
    shared: float


def shared_features(one: Dictionary, other: Dictionary, *, threshold: float = 0.7) -> SeedSpread:
    """Compares two trainings that differ in their seed (threshold of arXiv 2501.16615).

    Raises:
        SAEError: they write different widths.
    """
    found = match_features(one, other)
    return SeedSpread(float(found.cosine.mean()), found.share_above(threshold))
