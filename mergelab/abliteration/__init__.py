"""Abliteration: the direction along which a model refuses, found, removed from its weights, and measured."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.abliteration.ablation import Ablation, LayerKernel, Space, unit
    from mergelab.abliteration.answers import REFUSAL_PHRASES, generate_answers, is_refusal
    from mergelab.abliteration.behavior import Behavior, first_token_scores, measure_behavior
    from mergelab.abliteration.bundled_prompts import built_in_prompts
    from mergelab.abliteration.direction_file import SavedDirection, load_direction, save_direction
    from mergelab.abliteration.direction_selection import DirectionSelection, Filters, select_direction
    from mergelab.abliteration.directions import Directions, find_directions
    from mergelab.abliteration.pipeline import abliterate
    from mergelab.abliteration.prompts import Prompts, encode_prompts, read_prompts
    from mergelab.abliteration.removal import ablate, abliterate_params, induce, orthogonalize
    from mergelab.abliteration.report import Report
    from mergelab.abliteration.search_journal import SearchJournal
    from mergelab.abliteration.settings import AbliterationSettings
    from mergelab.abliteration.trial_search import search_ablation
    from mergelab.abliteration.trials import CHOICES, SearchResult, Trial
    from mergelab.abliteration.write import write_abliterated

__all__ = [
    "CHOICES",
    "REFUSAL_PHRASES",
    "Ablation",
    "AbliterationSettings",
    "Behavior",
    "DirectionSelection",
    "Directions",
    "Filters",
    "LayerKernel",
    "Prompts",
    "Report",
    "SavedDirection",
    "SearchJournal",
    "SearchResult",
    "Space",
    "Trial",
    "ablate",
    "abliterate",
    "abliterate_params",
    "built_in_prompts",
    "encode_prompts",
    "find_directions",
    "first_token_scores",
    "generate_answers",
    "induce",
    "is_refusal",
    "load_direction",
    "measure_behavior",
    "orthogonalize",
    "read_prompts",
    "save_direction",
    "search_ablation",
    "select_direction",
    "unit",
    "write_abliterated",
]

__getattr__, __dir__ = lazy_names(__name__)
