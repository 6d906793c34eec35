"""Feature absorption: tokens of a class on which its own latents are silent and another stands in for them.

After "A is for absorption" (Chanin et al., arXiv 2409.14507): a class that a probe tells from the activations
has main latents; where those fail on a token of the class, and the one latent that writes most along the
probe's direction accounts for it alone, that latent has absorbed the feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mergelab.errors import SAEError
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.probing import fit_logistic, rows_with_labels, sparse_probe
from mergelab.sae.sae import SAE
from mergelab.sae.splice import encode, read_batches
from mergelab.sae.subject_model import check_target

__all__ = ["Absorption", "absorption"]


@dataclass(frozen=True)
class Absorption:
    """Absorption of one class.

    Attributes:
        rate: absorbed tokens over the tokens of the class that the probe gets right.
        missed: tokens of the class that the probe gets right and no main latent is active on, over the same.
        main: latents that stand for the class: more than one where the feature has split.
        absorbing: latents that took it over, the most frequent first.
    """

    rate: float
    missed: float
    main: tuple[int, ...]
    absorbing: tuple[int, ...]


def absorption(
    sae: SAE,
    x: np.ndarray,
    labels: np.ndarray,
    *,
    codes: np.ndarray | None = None,
    max_main: int = 5,
    gain: float = 0.03,
    cosine: float = 0.025,
    share: float = 0.4,
    seed: int = 0,
) -> Absorption:
    """Measures it on activations with labels.

    Args:
        sae: reconstructs the activations, and reads them unless it is a transcoder.
        x: `[rows, d]`, float32, of the site it writes.
        labels: `[rows]`, bool: the class.
        codes: `[rows, n_latents]` of the same tokens, where they are known; a transcoder's must be.
        max_main: main latents at most.
        gain: a further main latent is one that raises the F1 of a sparse probe by so much.
        cosine: least cosine of an absorbing latent's direction with the probe's.
        share: least fraction of the reconstruction's projection on the probe that an absorbing latent writes.
        seed: seed of the halves that fit and judge probes.

    Raises:
        SAEError: a class is missing, or the probe gets no token of the class right.
    """
    if codes is None and not sae.is_autoencoder:
        raise SAEError(
            f"the SAE is a transcoder ({sae.mapping()}), so the activations it writes do not "
            "give its codes; give both."
        )
    if x.shape[1] != sae.d_out:
        raise SAEError(f"activations are {x.shape[1]} wide, but the SAE writes {sae.d_out}.")
    codes = np.asarray(encode(sae, jnp.asarray(x))) if codes is None else codes
    main = _main_latents(codes, labels, max_main, gain, seed)
    weights, bias, _ = fit_logistic(jnp.asarray(x), jnp.asarray(labels))
    direction = np.asarray(weights, np.float64)
    right = labels & (x @ direction + float(bias) > 0)
    if not right.any():
        raise SAEError(
            "the probe gets no token of the class right, so the site does not hold it; take another."
        )
    missed = right & (codes[:, main] <= 0).all(axis=1)
    unit = direction / np.linalg.norm(direction)
    decoder = np.asarray(sae.W_dec, np.float64)
    along = decoder @ unit
    written = codes[missed] * along[None]
    largest = written.argmax(axis=1)
    projection = written.sum(axis=1)
    rows = np.arange(len(written))
    alike = along[largest] / np.maximum(np.linalg.norm(decoder[largest], axis=1), 1e-12)
    taken = (alike >= cosine) & (written[rows, largest] > 0) & (written[rows, largest] >= share * projection)
    who, counts = np.unique(largest[taken], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return Absorption(
        rate=float(taken.sum() / right.sum()),
        missed=float(missed.sum() / right.sum()),
        main=main,
        absorbing=tuple(int(latent) for latent in who[order]),
    )


def _main_latents(
    codes: np.ndarray, labels: np.ndarray, most: int, gain: float, seed: int
) -> tuple[int, ...]:
    best = sparse_probe(codes, labels, 1, seed=seed)
    for k in range(2, min(most, codes.shape[1]) + 1):
        found = sparse_probe(codes, labels, k, seed=seed)
        if found.f1 < best.f1 + gain:
            break
        best = found
    return best.latents


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    codes, tasks = rows_with_labels(sae, evidence, lambda d, x: d.encode(x))
    contexts = evidence.held_contexts(sae.n_latents)
    # The probe reads the site at which decoder rows mean something.
    written = check_target(sae, evidence.judge)
    x = np.concatenate(list(read_batches(evidence.judge, contexts, written)))
    found = []
    for labels in tasks.values():
        try:
            found.append(absorption(sae, x, labels, codes=codes, seed=options.seed))
        except SAEError:  # the site does not hold this class
            continue
    if not found:
        raise SAEError("no probing task can be told from the site's activations; give other text, or more.")
    rate = float(np.mean([one.rate for one in found]))
    main = float(np.mean([len(one.main) for one in found]))
    yield "rate", rate, f"absorbed fraction of a class's tokens, mean of {len(found)} tasks; 0 best"
    yield "split", main, "main latents of a class; 1 where it is not split"


METRIC = Metric(
    name="absorption",
    about="tokens of a class that another latent has absorbed",
    units={"rate": "", "split": "latents / class"},
    measure=_scores,
    needs=("labels",),
)
