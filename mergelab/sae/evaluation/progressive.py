"""A trained SAE with another sparsity: more or fewer active latents than it learned with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.reconstruction import Totals
from mergelab.sae.features.matching import match_features
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode, encode_and_reconstruct, read_pairs

__all__ = ["RecallPoint", "RecoveryPoint", "progressive_recovery", "recall_against_sparsity"]
__all__ += ["with_threshold", "with_top_k"]


def with_top_k(sae: SAE, k: int) -> SAE:
    """The same arrays, keeping the k largest pre-activations of each token.

    Raises:
        SAEError: the SAE is gated, or has fewer latents.
    """
    _check_path(sae)
    return replace(sae, config=replace(sae.config, activation="topk", k=k)).checked()


def with_threshold(sae: SAE, threshold: float) -> SAE:
    """The same arrays, keeping the pre-activations above one threshold for all latents (JumpReLU).

    Raises:
        SAEError: the SAE is gated.
    """
    _check_path(sae)
    config = replace(sae.config, activation="jump_relu", k=None)
    level = jnp.full(sae.n_latents, threshold, sae.b_enc.dtype)
    return replace(sae, threshold=level, config=config).checked()


def _check_path(sae: SAE) -> None:
    if sae.config.activation == "gated":
        raise SAEError("a gated SAE measures by another path than it selects by; its rule stays.")


@dataclass(frozen=True)
class RecoveryPoint:
    """One setting of the rule that selects latents.

    Attributes:
        k: latents kept per token, or None for a threshold.
        threshold: value above which latents are kept, or None for a k.
        l0: latents active in an average row.
        nmse: normalized mean squared error.
        explained_variance: 1 - variance of the error over that of the activations.
    """

    k: int | None
    threshold: float | None
    l0: float
    nmse: float
    explained_variance: float


def progressive_recovery(
    sae: SAE,
    x: np.ndarray,
    *,
    ks: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    batch: int = 4096,
    targets: np.ndarray | None = None,
) -> list[RecoveryPoint]:
    """Reconstruction at other sparsities than the trained one (arXiv 2406.04093, section 5.3).

    Args:
        sae: SAE as trained.
        x: `[rows, d]`, float32.
        ks: latents per token to keep, each tried alone.
        thresholds: thresholds to keep latents above, each tried alone.
        batch: rows at a time.
        targets: `[rows, d_out]`, float32, what a transcoder is to write of the same tokens.

    Raises:
        SAEError: the SAE is gated, a k is not among 1 to its latents, or a transcoder has no targets.
    """
    if targets is None and not sae.is_autoencoder:
        raise SAEError(
            f"the SAE is a transcoder ({sae.mapping()}), so it is not to be compared with what "
            "it reads; give the targets."
        )
    y = x if targets is None else targets
    points: list[RecoveryPoint] = []
    trials = [(with_top_k(sae, k), k, None) for k in ks]
    trials += [(with_threshold(sae, t), None, t) for t in thresholds]
    for trial, k, threshold in trials:
        totals = Totals.zero(y[:batch], sae.n_latents)
        for start in range(0, len(x), batch):
            codes, out = encode_and_reconstruct(trial, jnp.asarray(x[start : start + batch]))
            totals = totals.add(y[start : start + batch], np.asarray(out), np.asarray(codes))
        found = totals.result()
        points.append(RecoveryPoint(k, threshold, found.l0, found.nmse, found.explained_variance))
    return points


@dataclass(frozen=True)
class RecallPoint:
    """How well active latents tell which true features are on, at one k.

    Attributes:
        k: latents kept per token.
        recall: fraction of the pairs of row and feature that are on whose matched latent is active.
        precision: fraction of the pairs of row and active matched latent whose feature is on.
    """

    k: int
    recall: float
    precision: float


def recall_against_sparsity(
    sae: SAE,
    x: np.ndarray,
    features: np.ndarray,
    present: np.ndarray,
    ks: Sequence[int],
) -> list[RecallPoint]:
    """Recall of known features as more latents are kept; each feature is matched to one latent.

    Args:
        sae: SAE as trained.
        x: `[rows, d]`, float32.
        features: `[n_features, d]`, their directions.
        present: `[rows, n_features]`, bool: which are on.
        ks: latents per token to keep.

    Raises:
        SAEError: the SAE is gated, a k is out of range, or widths differ.
    """
    truth = replace(sae, W_dec=jnp.asarray(features))
    matched = match_features(truth, sae)
    known = matched.latent >= 0
    latents, on = matched.latent[known], present[:, known]
    points = []
    for k in ks:
        active = np.asarray(encode(with_top_k(sae, k), jnp.asarray(x)))[:, latents] > 0
        hits = int((active & on).sum())
        points.append(RecallPoint(k, hits / max(int(on.sum()), 1), hits / max(int(active.sum()), 1)))
    return points


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    most = evidence.held_contexts(sae.d_in + (0 if sae.is_autoencoder else sae.d_out))
    pairs = list(read_pairs(sae, evidence.judge, most))
    x = np.concatenate([read[kept] for read, _, kept in pairs])
    y = None if sae.is_autoencoder else np.concatenate([written[kept] for _, written, kept in pairs])
    k = sae.config.k or max(1, round(float((sae.encode(jnp.asarray(x[:4096])) > 0).sum(1).mean())))
    ks = [at for at in (k // 4, k // 2, 2 * k, 4 * k) if 1 <= at <= sae.n_latents]
    for point in progressive_recovery(sae, x, ks=ks, targets=y):
        yield f"nmse_k{point.k}", point.nmse, f"keeping {point.k} latents, trained with about {k}"


METRIC = Metric(
    name="progressive",
    about="error when fewer or more latents are kept",
    units={"nmse_k*": ""},
    measure=_scores,
)
