"""Merging checkpoints: a recipe, its plan, and the streamed run; soups and vocabularies beside.

>>> from mergelab.merging import load_recipe, merge
>>> merge(load_recipe("ties.yaml"), "merged", seed=1)                            # doctest: +SKIP
"""

from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.recipe.recipe_file import load_recipe, parse_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.run_merge import Merged, MergeOptions, merge

__all__ = [
    "MergeOptions",
    "Merged",
    "Plan",
    "Recipe",
    "load_recipe",
    "merge",
    "parse_recipe",
    "plan_merge",
    "recipe_yaml",
]
