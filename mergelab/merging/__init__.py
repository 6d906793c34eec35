"""Merging checkpoints: a recipe, its plan, and the streamed run; soups and vocabularies beside.

>>> from mergelab.merging import Recipe, merge
>>> merge(Recipe.load("ties.yaml"), "merged", seed=1)                            # doctest: +SKIP
"""

from mergelab.merging.merge import Merged, merge
from mergelab.merging.plan import Plan, make_plan
from mergelab.merging.recipe import Recipe

__all__ = ["Merged", "Plan", "Recipe", "make_plan", "merge"]
