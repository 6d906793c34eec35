"""Abliteration: the direction along which a model refuses, found, removed from its weights, and measured."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.abliteration.ablation import Ablation, LayerKernel, Space, unit
    from mergelab.abliteration.behavior import Behavior, first_token_scores, measure_behavior
    from mergelab.abliteration.direction_selection import DirectionSelection, Filters, select_direction
    from mergelab.abliteration.directions import Directions, find_directions
    from mergelab.abliteration.pipeline import AbliterationSettings, abliterate
    from mergelab.abliteration.prompts import Prompts, encode_prompts, read_prompts
    from mergelab.abliteration.removal import ablate, abliterate_params, induce, orthogonalize
    from mergelab.abliteration.report import Report
    from mergelab.abliteration.trial_search import SearchResult, Trial, search_ablation
    from mergelab.abliteration.write import write_abliterated

__all__ = [
    "Ablation",
    "AbliterationSettings",
    "Behavior",
    "DirectionSelection",
    "Directions",
    "Filters",
    "LayerKernel",
    "Prompts",
    "Report",
    "SearchResult",
    "Space",
    "Trial",
    "ablate",
    "abliterate",
    "abliterate_params",
    "encode_prompts",
    "find_directions",
    "first_token_scores",
    "induce",
    "measure_behavior",
    "orthogonalize",
    "read_prompts",
    "search_ablation",
    "select_direction",
    "unit",
    "write_abliterated",
]

__getattr__, __dir__ = lazy_names(__name__)
