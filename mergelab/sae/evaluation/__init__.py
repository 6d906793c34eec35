"""How good an SAE is: one file per evaluation, the scorecard of them all, and controls."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names
from mergelab.sae.evaluation.absorption import Absorption, absorption
from mergelab.sae.evaluation.scorecard import (
    METRICS,
    EvaluationJournal,
    Scorecard,
    applicable_metrics,
    control_scorecard,
    evaluation_key,
    scorecard,
    seed_spread,
)

if TYPE_CHECKING:
    from mergelab.sae.evaluation.controls import CONTROLS, control_sae, random_model
    from mergelab.sae.evaluation.evaluate import evaluate_sae
    from mergelab.sae.evaluation.explanation_loss import ExplanationScore, score_explanations
    from mergelab.sae.evaluation.label_files import LabeledText, labeled_texts, read_labeled_texts
    from mergelab.sae.evaluation.metric import Evidence, Metric, Options, Score
    from mergelab.sae.evaluation.own_labels import (
        LabeledContexts,
        LabelProbes,
        label_contexts,
        probe_labels,
    )
    from mergelab.sae.evaluation.probing import SparseProbe, best_probes, probe_losses, sparse_probe
    from mergelab.sae.evaluation.probing_tasks import TASKS, character_labels, label_texts
    from mergelab.sae.evaluation.progressive import (
        RecallPoint,
        RecoveryPoint,
        progressive_recovery,
        recall_against_sparsity,
    )
    from mergelab.sae.evaluation.reconstruction import (
        Reconstruction,
        density_histogram,
        evaluate_reconstruction,
        reconstruction_on_model,
    )
    from mergelab.sae.evaluation.scaling_law import ScalingLaw, fit_scaling_law
    from mergelab.sae.evaluation.sparse_coding import (
        AmortizationGap,
        amortization_gap,
        coding_target,
        elastic_net,
        hard_threshold,
        lasso,
        matching_pursuit,
        orthogonal_matching_pursuit,
    )
    from mergelab.sae.evaluation.sparsity import (
        AblationSparsity,
        channel_sparsity,
        effect_sparsity,
        latent_sparsity,
    )
    from mergelab.sae.evaluation.text_embeddings import EmbeddingChange, evaluate_embeddings
    from mergelab.sae.evaluation.training_curve import (
        LossCurve,
        compute_equivalent,
        loss_curve,
        open_loss_curve,
    )
    from mergelab.sae.spliced_losses import Downstream, evaluate_downstream

__all__ = [
    "CONTROLS",
    "METRICS",
    "TASKS",
    "AblationSparsity",
    "Absorption",
    "AmortizationGap",
    "Downstream",
    "EmbeddingChange",
    "EvaluationJournal",
    "Evidence",
    "ExplanationScore",
    "LabelProbes",
    "LabeledContexts",
    "LabeledText",
    "LossCurve",
    "Metric",
    "Options",
    "RecallPoint",
    "Reconstruction",
    "RecoveryPoint",
    "ScalingLaw",
    "Score",
    "Scorecard",
    "SparseProbe",
    "absorption",
    "amortization_gap",
    "applicable_metrics",
    "best_probes",
    "channel_sparsity",
    "character_labels",
    "coding_target",
    "compute_equivalent",
    "control_sae",
    "control_scorecard",
    "density_histogram",
    "effect_sparsity",
    "elastic_net",
    "evaluate_downstream",
    "evaluate_embeddings",
    "evaluate_reconstruction",
    "evaluate_sae",
    "evaluation_key",
    "fit_scaling_law",
    "hard_threshold",
    "label_contexts",
    "label_texts",
    "labeled_texts",
    "lasso",
    "latent_sparsity",
    "loss_curve",
    "matching_pursuit",
    "open_loss_curve",
    "orthogonal_matching_pursuit",
    "probe_labels",
    "probe_losses",
    "progressive_recovery",
    "random_model",
    "read_labeled_texts",
    "recall_against_sparsity",
    "reconstruction_on_model",
    "score_explanations",
    "scorecard",
    "seed_spread",
    "sparse_probe",
]

__getattr__, __dir__ = lazy_names(__name__)
