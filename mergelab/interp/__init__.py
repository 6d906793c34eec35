"""Interpretability on named sites: edits, lenses, attribution, heads, probes, model diffing."""

from typing import TYPE_CHECKING

from mergelab.interp.path_patching import path_patching
from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.interp.attention_heads import (
        HeadScores,
        HeadWeights,
        composition_scores,
        copying_scores,
        head_scores,
        head_weights,
        repeated_tokens,
    )
    from mergelab.interp.attribution import Attribution, direct_logit_attribution
    from mergelab.interp.edits import ablate, patch, steer
    from mergelab.interp.feature_geometry import PCA, Manifold, feature_manifold, pca, similar_latents
    from mergelab.interp.function_vectors import (
        FunctionVector,
        function_vector,
        indirect_effects,
        mean_heads,
    )
    from mergelab.interp.latent_edits import add, clamp, edit_latents, scale, splice
    from mergelab.interp.lens import LensReading, TunedLens, logit_lens, read_lens, train_tuned_lens
    from mergelab.interp.logit_metrics import (
        LogitMetric,
        logit_difference,
        token_log_probability,
        token_probability,
    )
    from mergelab.interp.model_diffing import LayerSwaps, NextTokens, compare_next_tokens, swap_layers
    from mergelab.interp.patching import PatchGrid, attribution_patching, patch_grid
    from mergelab.interp.probes import Probe, fit_linear, fit_logistic, fit_ridge
    from mergelab.interp.steering import SteeringVector, add_vector, latent_direction, steering_vector
    from mergelab.interp.steering_files import load_steering, save_steering
    from mergelab.interp.value_vectors import ValueVectors, tokens_of_values, value_search
    from mergelab.interp.vectors import mean_difference, mean_norm, principal_difference, project_out, unit

__all__ = [
    "PCA",
    "Attribution",
    "FunctionVector",
    "HeadScores",
    "HeadWeights",
    "LayerSwaps",
    "LensReading",
    "LogitMetric",
    "Manifold",
    "NextTokens",
    "PatchGrid",
    "Probe",
    "SteeringVector",
    "TunedLens",
    "ValueVectors",
    "ablate",
    "add",
    "add_vector",
    "attribution_patching",
    "clamp",
    "compare_next_tokens",
    "composition_scores",
    "copying_scores",
    "direct_logit_attribution",
    "edit_latents",
    "feature_manifold",
    "fit_linear",
    "fit_logistic",
    "fit_ridge",
    "function_vector",
    "head_scores",
    "head_weights",
    "indirect_effects",
    "latent_direction",
    "load_steering",
    "logit_difference",
    "logit_lens",
    "mean_difference",
    "mean_heads",
    "mean_norm",
    "patch",
    "patch_grid",
    "path_patching",
    "pca",
    "principal_difference",
    "project_out",
    "read_lens",
    "repeated_tokens",
    "save_steering",
    "scale",
    "similar_latents",
    "splice",
    "steer",
    "steering_vector",
    "swap_layers",
    "token_log_probability",
    "token_probability",
    "tokens_of_values",
    "train_tuned_lens",
    "unit",
    "value_search",
]

__getattr__, __dir__ = lazy_names(__name__)
