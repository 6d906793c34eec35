"""What the model loses with reconstructions in place of activations, and loss curves to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations.capture import ModelActivations
from mergelab.activations.losses import kl_of_log_probabilities
from mergelab.errors import SAEError
from mergelab.models.load import load_model
from mergelab.models.model import Model
from mergelab.models.residual_stream import require_decoder
from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.sae import SAE
from mergelab.sae.splice import mean_activation, splice_from, token_batches
from mergelab.sae.subject_model import check_target

__all__ = ["Downstream", "checkpoint_folders", "compute_equivalent", "evaluate_downstream", "loss_curve"]


@dataclass(frozen=True)
class Downstream:
    """Losses of one model on one text, in nats per predicted token.

    Attributes:
        tokens: predicted tokens; the first of each context is none.
        ce: cross-entropy of the model as it is.
        ce_spliced: the same with the site that the SAE writes replaced by its reconstruction.
        ce_zero: the same with the site replaced by zero.
        ce_mean: the same with the site replaced by its mean over the text.
        kl: `KL(as it is || spliced)` of the next-token distributions.
    """

    tokens: int
    ce: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl: float

    @property
    def delta_ce(self) -> float:
        """`ce_spliced - ce`."""
        return self.ce_spliced - self.ce

    @property
    def recovered_zero(self) -> float:
        """`(ce_zero - ce_spliced) / (ce_zero - ce)`: 1 is lossless, 0 as bad as zero ablation."""
        return _recovered(self.ce_zero, self.ce_spliced, self.ce)

    @property
    def recovered_mean(self) -> float:
        """`(ce_mean - ce_spliced) / (ce_mean - ce)`: 1 is lossless, 0 as bad as mean ablation."""
        return _recovered(self.ce_mean, self.ce_spliced, self.ce)


def _recovered(ablated: float, spliced: float, plain: float) -> float:
    return (ablated - spliced) / (ablated - plain) if ablated != plain else float("nan")


def evaluate_downstream(sae: SAE, source: ModelActivations, *, contexts: int | None = None) -> Downstream:
    """Runs the model as it is, spliced, and ablated in both ways (arXiv 2406.04093, section 4.1).

    Args:
        sae: SAE that reads the first of the source's sites, and reconstructs it or, as a transcoder, another.
        source: model and text.
        contexts: number of contexts to use, from the start; all by default.

    Raises:
        SAEError: the SAE does not fit the sites, or the model predicts no tokens.
    """
    target = check_target(sae, source)
    require_decoder(source.model)
    mean = jnp.asarray(mean_activation(source, contexts, target), jnp.float32)
    sites = (source.sites[0], target)
    tokens = source.tokens[:contexts]
    total = np.zeros(5)
    for batch, real in token_batches(tokens, source.batch):
        found = np.asarray(
            _losses(source.params, sae, mean, batch, model=source.model, sites=sites),
            np.float64,
        )
        total += found[:, :real].sum(axis=1)
    predicted = len(tokens) * (tokens.shape[1] - 1)
    return Downstream(predicted, *(float(value) for value in total / predicted))


@partial(jax.jit, static_argnames=("model", "sites"))
def _losses(
    params: Any, sae: SAE, mean: Array, tokens: Array, *, model: Model, sites: tuple[str, str]
) -> Array:
    """Sums over each context, `[5, batch]`, in the order of the fields of `Downstream`.

    `sites` are what the SAE reads and what it writes.
    """
    read, site = sites

    def log_probabilities(edit: Any) -> tuple[Array, Array]:
        out = model.apply(params, tokens, edit=edit, capture=[read])
        assert out.logits is not None
        return jax.nn.log_softmax(out.logits[:, :-1]), out.captured[read]

    def middle(x: Array) -> Array:
        return jnp.broadcast_to(mean.reshape(1, 1, *x.shape[2:]).astype(x.dtype), x.shape)

    def cross_entropy(logp: Array) -> Array:
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0].sum(axis=1)

    plain, x = log_probabilities(None)
    edits = ({site: splice_from(sae, x)}, {site: jnp.zeros_like}, {site: middle})
    found = [plain, *(log_probabilities(edit)[0] for edit in edits)]
    kl = kl_of_log_probabilities(found[0], found[1]).sum(axis=1)
    return jnp.stack([*(cross_entropy(logp) for logp in found), kl])


def compute_equivalent(steps: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """The fraction of a model's training after which it had this loss (arXiv 2406.04093, section 4.1).

    The curve is what the model's own checkpoints lose on the same text. It is made monotone by leaving out
    points that do not improve on all before them, and interpolated linearly in the logarithm of the step.

    Args:
        steps: `[points]`, rising, above 0.
        losses: `[points]`, in the unit of `loss`.
        loss: loss of the model with the SAE spliced in.

    Returns:
        Fraction from 0 to 1 of the last step; 1 where the loss is at least as good as the curve's best,
        NaN where it is above its first.

    Raises:
        SAEError: the curve has fewer than two points, or its steps do not rise from above 0.
    """
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if len(steps) < 2 or steps.shape != losses.shape or steps[0] <= 0 or (np.diff(steps) <= 0).any():
        raise SAEError(
            f"the curve has {len(steps)} steps and {len(losses)} losses; expected two or more of each, steps "
            "rising from above 0."
        )
    if loss > losses[0]:
        return float("nan")
    best = np.minimum.accumulate(losses)
    kept = np.concatenate([[True], best[1:] < best[:-1]])
    if loss <= best[-1]:
        return 1.0
    # np.interp wants rising abscissae: losses fall along the curve.
    log_step = np.interp(loss, losses[kept][::-1], np.log(steps[kept])[::-1])
    return float(np.exp(log_step) / steps[-1])


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Checkpoints by training step, rising: the subfolders that are named by a number.

    Raises:
        SAEError: there are fewer than two.
    """
    found = {int(path.name): path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()}
    if len(found) < 2:
        raise SAEError(
            f"{folder}: holds {len(found)} folders named by a training step; expected two or more, such as "
            "10, 100 and 1000, each a model's folder."
        )
    return dict(sorted(found.items()))


def loss_curve(folder: Path, source: ModelActivations, *, mesh: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of every checkpoint on the source's contexts, as `evaluate_downstream` takes it.

    Args:
        folder: holds a model's folder per training step (`checkpoint_folders`).
        source: the finished model and the text; use the half that judges (`scorecard.halves`).
        mesh: devices to spread the checkpoints over, one at a time.

    Returns:
        Steps and losses in nats per predicted token, float64 `[checkpoints]` each.

    Raises:
        SAEError: there are no checkpoints, one is of another shape, or the model predicts no tokens.
        CheckpointError: one cannot be read.
    """
    require_decoder(source.model)
    folders = checkpoint_folders(folder)
    losses = []
    for path in folders.values():
        model, params = load_model(path, mesh=mesh)
        if model != source.model:
            raise SAEError(f"{path}: holds a model of another shape than the SAE's; give its checkpoints.")
        total = 0.0
        for tokens, real in token_batches(source.tokens, source.batch):
            total += float(
                np.asarray(_curve_losses(params, tokens, model=source.model), np.float64)[:real].sum()
            )
        losses.append(total / (len(source.tokens) * (source.tokens.shape[1] - 1)))
    return np.array(list(folders), np.float64), np.array(losses)


@partial(jax.jit, static_argnames="model")
def _curve_losses(params: Any, tokens: Array, *, model: Model) -> Array:
    """Sums over each context, `[batch]`."""
    out = model.apply(params, tokens).logits
    assert out is not None
    logp = jax.nn.log_softmax(out[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0].sum(axis=1)


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    found = evaluate_downstream(sae, evidence.judge)
    yield "delta_ce", found.delta_ce, f"over the model's own {found.ce:.4f}; 0 is lossless"
    yield "kl", found.kl, "from the model's own next-token distribution; 0 is lossless"
    yield "recovered_zero", found.recovered_zero, "1 lossless, 0 as bad as zero ablation"
    yield "recovered_mean", found.recovered_mean, "1 lossless, 0 as bad as mean ablation"
    if "curve" in evidence:
        steps, losses = evidence.get("curve")
        part = compute_equivalent(steps, losses, found.ce_spliced)
        yield "compute_equivalent", part, "fraction of the model's training with the same loss"


METRIC = Metric(
    name="downstream",
    about="loss of the model with the reconstruction spliced in",
    units={
        "delta_ce": "nats / token",
        "kl": "nats / token",
        "recovered_zero": "",
        "recovered_mean": "",
        "compute_equivalent": "",
    },
    measure=_scores,
    needs=("logits",),
)
