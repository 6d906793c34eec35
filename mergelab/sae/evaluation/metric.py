"""The table of evaluations that a scorecard runs: a name, what it needs, and the scores it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.errors import SAEError
from mergelab.sae.evaluation.absorption import absorption
from mergelab.sae.evaluation.downstream import compute_equivalent, evaluate_downstream
from mergelab.sae.evaluation.explanation_loss import ExplanationScore, score_explanations
from mergelab.sae.evaluation.probing import best_probes, sparse_probe
from mergelab.sae.evaluation.progressive import progressive_recovery
from mergelab.sae.evaluation.reconstruction import densities, reconstruction_on_model
from mergelab.sae.evaluation.sparsity import channel_sparsity, latent_sparsity
from mergelab.sae.evaluation.text_embeddings import evaluate_embeddings
from mergelab.sae.features.explanations import mean_match
from mergelab.sae.features.n2g import explain, match_explanations
from mergelab.sae.features.survey import survey
from mergelab.sae.sae import SAE
from mergelab.sae.splice import read_batches, read_pairs
from mergelab.sae.subject_model import check_target

__all__ = ["METRICS", "Evidence", "Metric", "Score"]

_HELD = 2**27  # numbers of codes or activations that are held at once, at most: half a gigabyte
_RARE = 0.01  # a task with fewer positives or negatives says nothing


@dataclass(frozen=True)
class Score:
    """A figure with what it takes to read it.

    Attributes:
        value: the figure.
        unit: its unit; empty for a pure number.
        against: what it is measured against, or which values are perfect and useless.
    """

    value: float
    unit: str
    against: str


@dataclass(frozen=True)
class Evidence:
    """What evaluations work on.

    Attributes:
        fit: model and the text that things are fitted on.
        judge: the same model and the text that scores are of.
        labels: of the text that judges, by task, bool `[contexts, length]`.
        mask_token: for explanations.
        curve: steps and losses of the host's training, or None.
        samples: ablations per kind of unit.
        explained: latents that are explained.
        seed: of everything drawn.
    """

    fit: ModelActivations
    judge: ModelActivations
    labels: Mapping[str, np.ndarray]
    mask_token: int
    curve: tuple[np.ndarray, np.ndarray] | None
    samples: int
    explained: int
    seed: int


@dataclass(frozen=True)
class Metric:
    """An evaluation.

    Attributes:
        measure: gives names and scores.
        needs_logits: whether the model must predict next tokens.
        needs_encoder: whether it must be an encoder, which makes vectors of texts.
        needs_labels: whether tokens must have labels.
    """

    measure: Callable[[SAE, Evidence], Iterator[tuple[str, Score]]]
    needs_logits: bool = False
    needs_encoder: bool = False
    needs_labels: bool = False


def _reconstruction(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    found = reconstruction_on_model(sae, evidence.judge)
    spread = densities(found.densities)
    written = check_target(sae, evidence.judge)
    taken = "" if sae.target_known else ", taken for what it writes as the SAE does not say it"
    against = f"squared error of {written} over that of its mean; 0 exact, 1 useless{taken}"
    yield "nmse", Score(found.nmse, "", against)
    yield "explained_variance", Score(found.explained_variance, "", "1 exact, 0 useless")
    yield "cosine", Score(found.cosine, "", "of a row and its reconstruction; 1 exact")
    yield "l2_ratio", Score(found.l2_ratio, "", "norm of reconstruction over norm of row; below 1 shrinks")
    yield "relative_bias", Score(found.relative_bias, "", "below 1 shrinks (2404.16014)")
    yield "l0", Score(found.l0, "latents / token", f"of {sae.n_latents}")
    yield "alive", Score(found.alive, "", f"part of the latents active in {found.rows} tokens")
    yield "median_density", Score(spread.median, "log10 of a part of tokens", "latents that are active")
    yield (
        "dense",
        Score(spread.dense / sae.n_latents, "", "part of the latents on over 10 % of tokens"),
    )


def _downstream(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    found = evaluate_downstream(sae, evidence.judge)
    nats = "nats / token"
    yield "delta_ce", Score(found.delta_ce, nats, f"over the model's own {found.ce:.4f}; 0 is lossless")
    yield "kl", Score(found.kl, nats, "from the model's own next-token distribution; 0 is lossless")
    yield "recovered_zero", Score(found.recovered_zero, "", "1 lossless, 0 as bad as zero ablation")
    yield "recovered_mean", Score(found.recovered_mean, "", "1 lossless, 0 as bad as mean ablation")
    if evidence.curve is not None:
        part = compute_equivalent(*evidence.curve, found.ce_spliced)
        yield "compute_equivalent", Score(part, "", "part of the host's training with the same loss")


def _embeddings(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    found = evaluate_embeddings(sae, evidence.judge)
    against = f"embeddings of {found.contexts} contexts, mean of their last states"
    yield "cosine", Score(found.cosine, "", f"{against}; 1 is lossless")
    yield "recovered", Score(found.recovered, "", "of the cosine; 1 lossless, 0 as bad as mean ablation")
    yield "rank", Score(found.rank, "", "Spearman over pairs of contexts, of their similarity; 1 is lossless")
    yield "nearest", Score(found.nearest, "", "part of the contexts that keep their nearest; 1 is lossless")


def _start(evidence: Evidence, width: int) -> int:
    """How many contexts of the text that judges may be held as rows of this width."""
    length = evidence.judge.tokens.shape[1]
    return max(1, min(len(evidence.judge.tokens), _HELD // (length * width)))


def _columns(
    sae: SAE, evidence: Evidence, what: Callable[[SAE, jax.Array], jax.Array]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes or pre-activations `[rows, n]` of the text's start, and its labels `[rows]`."""
    contexts = _start(evidence, sae.n_latents)
    run = jax.jit(what)
    rows = [np.asarray(run(sae, jnp.asarray(x))) for x in read_batches(evidence.judge, contexts)]
    labels = {name: label[:contexts].reshape(-1) for name, label in evidence.labels.items()}
    return np.concatenate(rows), {n: v for n, v in labels.items() if _RARE < v.mean() < 1 - _RARE}


def _probing(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    pre, tasks = _columns(sae, evidence, lambda d, x: d.pre_activations(x))
    if not tasks:
        raise SAEError("no probing task has both classes in the text; give other text, or more.")
    best = best_probes(pre, tasks)
    mean = float(np.mean([probe.loss for probe in best.values()]))
    part = float(np.mean([probe.loss / probe.prior for probe in best.values()]))
    yield "loss", Score(mean, "nats / token", f"best latent of each, mean of {len(tasks)} tasks; 0 perfect")
    yield "relative_loss", Score(part, "", "over always saying the class's frequency; 1 useless")
    codes, tasks = _columns(sae, evidence, lambda d, x: d.encode(x))
    for k in (1, 2, 5):
        f1 = [sparse_probe(codes, labels, k, seed=evidence.seed).f1 for labels in tasks.values()]
        yield f"f1_{k}", Score(float(np.mean(f1)), "", f"probe on {k} latents, held-out; 1 perfect")


def _absorption(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    codes, tasks = _columns(sae, evidence, lambda d, x: d.encode(x))
    contexts = len(codes) // evidence.judge.tokens.shape[1]
    # The probe reads the site at which decoder rows mean something.
    written = check_target(sae, evidence.judge)
    x = np.concatenate(list(read_batches(evidence.judge, contexts, written)))
    found = []
    for labels in tasks.values():
        try:
            found.append(absorption(sae, x, labels, codes=codes, seed=evidence.seed))
        except SAEError:  # the site does not hold this class
            continue
    if not found:
        raise SAEError("no probing task can be told from the site's activations; give other text, or more.")
    rate = float(np.mean([one.rate for one in found]))
    main = float(np.mean([len(one.main) for one in found]))
    yield "rate", Score(rate, "", f"absorbed part of a class's tokens, mean of {len(found)} tasks; 0 best")
    yield "split", Score(main, "latents / class", "main latents of a class; 1 is no splitting")


def _sparsity(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    source, samples, seed = evidence.judge, evidence.samples, evidence.seed
    against = "effective part of V x T logits that an ablation moves; lower is more local"
    latents = latent_sparsity(sae, source, samples=samples, seed=seed)
    yield "latents", Score(latents.sparsity, "", against)
    written = check_target(sae, source)
    channels = channel_sparsity(replace(source, sites=(written,)), samples=samples, seed=seed)
    yield "channels", Score(channels.sparsity, "", f"the same of channels of {written}")
    neurons = ".".join([*written.split(".")[:2], "mlp.post"])
    if len(source.model.sites().get(neurons, ())) == 3:
        found = channel_sparsity(replace(source, sites=(neurons,)), samples=samples, seed=seed)
        yield "neurons", Score(found.sparsity, "", f"the same of channels of {neurons}")


def _explanations(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    causal = evidence.judge.model.family.architecture.causal
    if causal:
        check_target(sae, evidence.judge)  # before the work of explaining
    seen = survey(sae, evidence.fit, latents=[])
    active = np.flatnonzero(seen.density > 0)
    if not len(active):
        raise SAEError("no latent is active in the first half of the text; give other text, or more.")
    chosen = np.random.default_rng(evidence.seed).permutation(active)[: evidence.explained]
    examples = survey(sae, evidence.fit, count=8, latents=chosen.tolist()).examples
    explained = explain(sae, evidence.fit, examples, mask_token=evidence.mask_token)
    judge = score_explanations if causal else match_explanations
    found = judge(sae, evidence.judge, list(explained.values()))
    matches = found.matches if isinstance(found, ExplanationScore) else found
    many = f"N2G of {len(explained)} latents, on text they are not made of"
    for name, value in zip(("precision", "recall"), mean_match(matches), strict=True):
        yield name, Score(value, "", f"{many}; 1 perfect")
    if not isinstance(found, ExplanationScore):
        return  # an encoder predicts nothing that an explanation could cost
    yield "delta_ce", Score(found.delta_ce, "nats / token", "these latents simulated; 0 is lossless")
    yield "recovered", Score(found.recovered, "", "1 lossless, 0 as bad as these latents at zero")


def _progressive(sae: SAE, evidence: Evidence) -> Iterator[tuple[str, Score]]:
    most = _start(evidence, sae.d_in + (0 if sae.is_autoencoder else sae.d_out))
    pairs = list(read_pairs(sae, evidence.judge, most))
    x = np.concatenate([read for read, _ in pairs])
    y = None if sae.is_autoencoder else np.concatenate([written for _, written in pairs])
    k = sae.config.k or max(1, round(float((sae.encode(jnp.asarray(x[:4096])) > 0).sum(1).mean())))
    ks = [at for at in (k // 4, k // 2, 2 * k, 4 * k) if 1 <= at <= sae.n_latents]
    for point in progressive_recovery(sae, x, ks=ks, targets=y):
        yield f"nmse_k{point.k}", Score(point.nmse, "", f"keeping {point.k} latents, trained with about {k}")


METRICS: Mapping[str, Metric] = {
    "reconstruction": Metric(_reconstruction),
    "downstream": Metric(_downstream, needs_logits=True),
    "embeddings": Metric(_embeddings, needs_encoder=True),
    "probing": Metric(_probing, needs_labels=True),
    "absorption": Metric(_absorption, needs_labels=True),
    "sparsity": Metric(_sparsity, needs_logits=True),
    "explanations": Metric(_explanations),
    "progressive": Metric(_progressive),
}
"""Evaluations by name, in the order a scorecard runs them."""
