"""Abliteration: the direction along which a model refuses, found, removed from its weights, and measured."""

from mergelab.interp.abliteration.ablation import Ablation, LayerKernel, unit
from mergelab.interp.abliteration.behaviour import Behaviour, measure_behaviour
from mergelab.interp.abliteration.directions import Directions, find_directions
from mergelab.interp.abliteration.prompts import Prompts, encode_prompts, read_prompts
from mergelab.interp.abliteration.report import Report
from mergelab.interp.abliteration.run import Settings, abliterate
from mergelab.interp.abliteration.runtime import ablate, induce
from mergelab.interp.abliteration.scores import first_token_scores
from mergelab.interp.abliteration.search import SearchResult, Trial, search_ablation
from mergelab.interp.abliteration.selection import Filters, Selection, select_direction
from mergelab.interp.abliteration.space import Space
from mergelab.interp.abliteration.weights import abliterate_params, orthogonalise
from mergelab.interp.abliteration.write import write_abliterated

__all__ = [
    "Ablation",
    "Behaviour",
    "Directions",
    "Filters",
    "LayerKernel",
    "Prompts",
    "Report",
    "SearchResult",
    "Selection",
    "Settings",
    "Space",
    "Trial",
    "ablate",
    "abliterate",
    "abliterate_params",
    "encode_prompts",
    "find_directions",
    "first_token_scores",
    "induce",
    "measure_behaviour",
    "orthogonalise",
    "read_prompts",
    "search_ablation",
    "select_direction",
    "unit",
    "write_abliterated",
]
