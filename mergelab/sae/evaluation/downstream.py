"""What the model loses with reconstructions in place of activations."""

from __future__ import annotations

from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Scores
from mergelab.sae.evaluation.training_curve import LossCurve, compute_equivalent
from mergelab.sae.sae import SAE
from mergelab.sae.spliced_losses import evaluate_downstream


def _scores(sae: SAE, evidence: Evidence, options: Options) -> Scores:
    found = evaluate_downstream(sae, evidence.judge)
    yield "delta_ce", found.delta_ce, f"over the model's own {found.ce:.4f}; 0 is lossless"
    yield "kl", found.kl, "from the model's own next-token distribution; 0 is lossless"
    yield "recovered_zero", found.recovered_zero, "1 lossless, 0 as bad as zero ablation"
    yield "recovered_mean", found.recovered_mean, "1 lossless, 0 as bad as mean ablation"
    if found.ce_everywhere is not None:
        every = found.ce_everywhere - found.ce
        yield "delta_ce_all", every, "delta_ce with tokens that do not count replaced too"
    if "curve" in evidence:
        curve = evidence.get("curve")
        steps, losses = curve.around(found.ce_spliced) if isinstance(curve, LossCurve) else curve
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
        "delta_ce_all": "nats / token",
        "compute_equivalent": "",
    },
    measure=_scores,
    needs=("logits",),
)
