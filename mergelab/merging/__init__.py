"""Merging checkpoints: a recipe, its plan, and the streamed run; soups and vocabularies beside.

>>> import mergelab as ml
>>> ml.merge(ml.load_recipe("ties.yaml"), "merged", seed=1)                      # doctest: +SKIP
>>> model, params = ml.load_model("ties.yaml")               # never written     # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.merging import diff, soups, vocabulary
    from mergelab.merging.adapter_merge import MergedAdapter, merge_adapters
    from mergelab.merging.any_model import load_model, load_tokenizer, open_model, stream
    from mergelab.merging.delta_extraction import ExtractedDelta, extract_delta
    from mergelab.merging.diff import ModelDiff, diff_models
    from mergelab.merging.findings import Finding
    from mergelab.merging.lora_extraction import ExtractedLora, extract_lora
    from mergelab.merging.plan.planner import Plan, plan_merge
    from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe, recipe_yaml
    from mergelab.merging.recipe.schema import Recipe, TokenizerSpec
    from mergelab.merging.recipe_check import RecipeCheck, check_recipe
    from mergelab.merging.run_merge import Merged, MergeOptions, merge
    from mergelab.merging.soups import soup
    from mergelab.merging.unwritten_merge import UnwrittenMerge, open_merge

__all__ = [
    "ExtractedDelta",
    "ExtractedLora",
    "Finding",
    "MergeOptions",
    "Merged",
    "MergedAdapter",
    "ModelDiff",
    "Plan",
    "Recipe",
    "RecipeCheck",
    "TokenizerSpec",
    "UnwrittenMerge",
    "check_recipe",
    "diff",
    "diff_models",
    "extract_delta",
    "extract_lora",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "merge",
    "merge_adapters",
    "open_merge",
    "open_model",
    "parse_recipe",
    "plan_merge",
    "recipe_yaml",
    "soup",
    "soups",
    "stream",
    "vocabulary",
]

__getattr__, __dir__ = lazy_names(__name__)
