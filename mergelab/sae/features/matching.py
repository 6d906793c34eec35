"""The same feature elsewhere: in another SAE, in a wider one, in the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE

__all__ = [
    "Child",
    "FeatureMatch",
    "Recovery",
    "SeedSpread",
    "feature_splits",
    "hierarchy",
    "match_features",
    "matched_cosine",
    "max_cosines",
    "recovery",
    "shared_features",
]


_EXACT = 4096  # up to this many latents the assignment is optimal: the algorithm is cubic
_PIECE = 1024

_Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FeatureMatch:
    """The match in the second SAE of each latent of the first.

    Attributes:
        latent: `[n]`, int64; -1 where one-to-one matching left none over.
        cosine: `[n]`, float32, cosine of the decoder directions; 0 where there is no match. Of two SAEs with
            signed codes, whose latents mean a direction and its opposite, the absolute value.
    """

    latent: np.ndarray
    cosine: np.ndarray

    def share_above(self, threshold: float) -> float:
        """The fraction of the latents whose match is more alike than this."""
        return float((self.cosine > threshold).mean())


def match_features(one: SAE, other: SAE, *, one_to_one: bool = True) -> FeatureMatch:
    """Pairs latents by the cosine of what they write.

    Trainings with the same seed begin from the same directions, latent by latent, whatever their width:
    compare such of different seeds.

    One-to-one pairs maximize the sum of cosines (Hungarian algorithm) for at most 4096 latents; beyond, they
    are taken greedily from the most alike pair of each row on. Otherwise every latent has its nearest.

    Args:
        one: an SAE.
        other: another of the same site.
        one_to_one: no latent of the second stands for two of the first.

    Raises:
        SAEError: they write different widths.
    """
    a, b = _directions(one), _directions(other)
    if a.shape[1] != b.shape[1]:
        raise SAEError(f"the SAEs write {a.shape[1]} and {b.shape[1]} wide; give two of one site.")
    signed = all(sae.activation.signed for sae in (one, other))
    measure = _either_way if signed else np.inner
    if not one_to_one:
        return _nearest(a, b, measure)
    if max(len(a), len(b)) > _EXACT:
        return _greedy(a, b, measure)
    from scipy.optimize import linear_sum_assignment

    cosines = measure(a, b)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    latent, cosine = np.full(len(a), -1), np.zeros(len(a), np.float32)
    latent[rows], cosine[rows] = columns, cosines[rows, columns]
    return FeatureMatch(latent, cosine)


def _either_way(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(np.inner(a, b))


def _directions(sae: SAE) -> np.ndarray:
    rows = np.asarray(sae.W_dec, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _nearest(a: np.ndarray, b: np.ndarray, measure: _Measure) -> FeatureMatch:
    latent, cosine = np.zeros(len(a), np.int64), np.zeros(len(a), np.float32)
    for start in range(0, len(a), _PIECE):
        piece = slice(start, start + _PIECE)
        cosines = measure(a[piece], b)
        latent[piece], cosine[piece] = cosines.argmax(axis=1), cosines.max(axis=1)
    return FeatureMatch(latent, cosine)


def _greedy(a: np.ndarray, b: np.ndarray, measure: _Measure) -> FeatureMatch:
    """Rounds: every free latent asks its nearest free one, which takes the most alike of those that ask."""
    latent, cosine = np.full(len(a), -1), np.zeros(len(a), np.float32)
    free_a, free_b = np.arange(len(a)), np.arange(len(b))
    while len(free_a) and len(free_b):
        near = _nearest(a[free_a], b[free_b], measure)
        order = np.argsort(-near.cosine, kind="stable")
        _, first = np.unique(near.latent[order], return_index=True)
        won = order[first]
        latent[free_a[won]], cosine[free_a[won]] = free_b[near.latent[won]], near.cosine[won]
        free_b = np.delete(free_b, near.latent[won])
        free_a = np.delete(free_a, won)
    return FeatureMatch(latent, cosine)


def feature_splits(narrow: SAE, wide: SAE, *, threshold: float = 0.5) -> dict[int, list[int]]:
    """Which latents of a wider SAE each latent of a narrow one has become.

    A latent of the wide one is a child of the nearest of the narrow one, if their cosine is above the
    threshold: a hierarchy in which a feature with two or more children has split.

    Args:
        narrow: an SAE.
        wide: another of the same site, with more latents.
        threshold: least cosine of parent and child.

    Returns:
        Children by latent of the narrow one, the most alike first; latents without any are omitted.

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
    """How much of an SAE another seed finds again.

    Attributes:
        mean_cosine: mean cosine of the one-to-one matches.
        shared: fraction of the latents whose match has a cosine above the threshold.
    """

    mean_cosine: float
    shared: float


def shared_features(one: SAE, other: SAE, *, threshold: float = 0.7) -> SeedSpread:
    """Compares two trainings that differ in their seed (threshold of arXiv 2501.16615).

    Raises:
        SAEError: they write different widths.
    """
    found = match_features(one, other)
    return SeedSpread(float(found.cosine.mean()), found.share_above(threshold))


@dataclass(frozen=True)
class Child:
    """A latent of the wider SAE.

    Attributes:
        latent: number of the latent there.
        cosine: cosine of what it writes with what its parent writes.
        tokens: the tokens it is most active on, each once, the strongest first.
    """

    latent: int
    cosine: float
    tokens: tuple[int, ...]


def hierarchy(
    narrow: SAE,
    wide: SAE,
    source: ModelActivations,
    latents: Sequence[int] | np.ndarray,
    *,
    threshold: float = 0.5,
    most: int = 6,
    examples: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, tuple[Child, ...]]:
    """The children of latents (`feature_splits`), in one pass of the wider SAE over a text.

    Args:
        narrow: an SAE.
        wide: another that reads the first of the source's sites, with more latents.
        source: model and text.
        latents: numbers of latents of the narrow one.
        threshold: least cosine of parent and child.
        most: children of a latent, the most alike ones.
        examples: contexts whose strongest token is taken.
        progress: function of the contexts done and their total.

    Returns:
        Children by latent; latents without any are omitted.

    Raises:
        SAEError: the wide SAE does not fit the site, or the two read or write different ones.
    """
    for what in ("reads", "writes"):
        one, other = getattr(narrow.config, what), getattr(wide.config, what)
        if one is not None and other is not None and one != other:
            raise SAEError(
                f"the wider SAE {what} {', '.join(other)}, but the other {', '.join(one)}; give "
                "one of the same sites."
            )
    splits = feature_splits(narrow, wide, threshold=threshold)
    chosen = {int(latent): splits[int(latent)][:most] for latent in latents if int(latent) in splits}
    wanted = sorted({child for children in chosen.values() for child in children})
    seen = survey(wide, source, count=examples, latents=wanted, progress=progress).examples
    up, down = _unit(np.asarray(narrow.W_dec)), _unit(np.asarray(wide.W_dec))
    return {
        latent: tuple(
            Child(
                child,
                float(up[latent] @ down[child]),
                tuple(dict.fromkeys(e.tokens[int(np.argmax(e.codes))] for e in seen[child])),
            )
            for child in children
        )
        for latent, children in chosen.items()
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


_FEATURES = 1024  # features that are compared with all rows at a time


@dataclass(frozen=True)
class Recovery:
    """Recovery of true features.

    Attributes:
        mean_max_cosine: mean, over the true features, of the cosine with the nearest row of the decoder.
        above: fraction of them whose nearest row has a cosine above .9.
    """

    mean_max_cosine: float
    above: float


def recovery(
    features: np.ndarray, decoder: np.ndarray, threshold: float = 0.9, *, either_sign: bool = False
) -> Recovery:
    """Compares a decoder with the ground truth; several features may have the same nearest row.

    Args:
        features: `[n_features, d]`, of any norm above 0.
        decoder: `[n_latents, d]`; rows of norm 0 point nowhere and have cosine 0.
        threshold: the cosine that `above` counts from.
        either_sign: whether a row that points the other way is as good: of an SAE with signed codes, such as
            `abs_topk`, half of the rows do, and their codes are negative.

    Raises:
        SAEError: the widths differ, or a feature has norm 0.
    """
    rows = np.concatenate([decoder, -decoder]) if either_sign else decoder
    nearest = max_cosines(features, rows)
    return Recovery(float(nearest.mean()), float((nearest > threshold).mean()))


def max_cosines(features: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """The cosine of each feature with the nearest row of the decoder: `[n_features]`, float32."""
    truth, rows = _unit_rows(features, decoder)
    pieces = [truth[start : start + _FEATURES] @ rows.T for start in range(0, len(truth), _FEATURES)]
    return np.concatenate([piece.max(axis=1) for piece in pieces])


def matched_cosine(features: np.ndarray, decoder: np.ndarray) -> float:
    """Mean cosine under the best assignment in which no row stands for two features (often called MCC).

    Where there are fewer rows than features, only as many features as there are rows count.

    Raises:
        SAEError: the widths differ, or a feature has norm 0.
    """
    from scipy.optimize import linear_sum_assignment

    truth, rows = _unit_rows(features, decoder)
    cosines = truth @ rows.T
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def _unit_rows(features: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if features.ndim != 2 or decoder.ndim != 2 or features.shape[1] != decoder.shape[1]:
        raise SAEError(
            f"features of shape {list(features.shape)} cannot be compared with a decoder of shape "
            f"{list(decoder.shape)}; expected [n_features, d] and [n_latents, d]."
        )
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise SAEError(f"feature {int(np.argmin(norms))} has norm 0, so nothing can recover it; omit it.")
    lengths = np.linalg.norm(decoder, axis=1, keepdims=True)
    rows = decoder / np.where(lengths > 0, lengths, 1)
    return (features / norms).astype(np.float32), rows.astype(np.float32)
