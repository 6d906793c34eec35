"""What single latents are: where they fire, what they write, and how they match those of other SAEs."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names
from mergelab.sae.features.figures_of_latents import latent_figures, latents_csv
from mergelab.sae.features.logit_effects import LogitEffects, logit_effects
from mergelab.sae.features.survey import Activity, Example, Survey, activity, survey

if TYPE_CHECKING:
    from mergelab.sae.features.explanations import LatentExplanation, Pattern, judge_explanation, mean_match
    from mergelab.sae.features.gallery import (
        Gallery,
        choose_latents,
        explain_gallery,
        make_gallery,
        page_data,
    )
    from mergelab.sae.features.latents_over_prompts import (
        LatentTable,
        growing_prefixes,
        latent_table,
        word_variants,
    )
    from mergelab.sae.features.matching import (
        Child,
        FeatureMatch,
        Recovery,
        SeedSpread,
        feature_splits,
        hierarchy,
        match_features,
        matched_cosine,
        max_cosines,
        recovery,
        shared_features,
    )
    from mergelab.sae.features.n2g import explain, find_patterns, match_explanations
    from mergelab.sae.features.neuronpedia import neuronpedia_batch

__all__ = [
    "Activity",
    "Child",
    "Example",
    "FeatureMatch",
    "Gallery",
    "LatentExplanation",
    "LatentTable",
    "LogitEffects",
    "Pattern",
    "Recovery",
    "SeedSpread",
    "Survey",
    "activity",
    "choose_latents",
    "explain",
    "explain_gallery",
    "feature_splits",
    "find_patterns",
    "growing_prefixes",
    "hierarchy",
    "judge_explanation",
    "latent_figures",
    "latent_table",
    "latents_csv",
    "logit_effects",
    "make_gallery",
    "match_explanations",
    "match_features",
    "matched_cosine",
    "max_cosines",
    "mean_match",
    "neuronpedia_batch",
    "page_data",
    "recovery",
    "shared_features",
    "survey",
    "word_variants",
]

__getattr__, __dir__ = lazy_names(__name__)
