"""A merge that is never written: a recipe as a checkpoint, whose tensors are merged when they are read."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.checkpoints.model_files import put_file
from mergelab.checkpoints.source import TensorSource
from mergelab.merging.engine.on_demand import merged_tensors
from mergelab.merging.plan.planner import Plan
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.run_merge import MergeOptions, settled_plan

__all__ = ["UnwrittenMerge", "open_merge"]


class UnwrittenMerge:
    """A `Checkpoint` of a merge that nobody has written; `mergelab.models.load_model` streams it.

    A tensor is merged while it is read, and forgotten soon after: what is held is the engine's blocks. The
    folder holds config, tokenizer and the other small files of the plan; it lasts as long as this object.

    Attributes:
        plan: what is merged.
        path: folder of the small files.
        tensors: sources by name, in the order in which a merge would store them.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, TensorSource]) -> None:
        self.plan, self.tensors = plan, tensors
        self.path = Path(tempfile.mkdtemp(prefix="mergelab-merge-"))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        for name, content in plan.files.items():
            put_file(self.path, name, content)
        if plan.config:
            put_file(self.path, "config.json", (json.dumps(dict(plan.config), indent=2) + "\n").encode())

    @property
    def config(self) -> Mapping[str, Any]:
        """The merge's `config.json`."""
        return self.plan.config

    def fingerprint(self) -> str:
        """The plan's identity: a SHA-256 hex digest of all that decides the values."""
        return self.plan.identity


def open_merge(
    recipe: Recipe | Plan | str | Path, options: MergeOptions | None = None, **changes: Any
) -> UnwrittenMerge:
    """A merge as an open checkpoint: planned and checked, and merged when it is read.

    The values are, to the bit, those of the folder that `merge` writes. Recipes that the last one builds on
    are merged on the way, block by block, as often as they are read.

    Args:
        recipe: recipe, path of one, or plan of one.
        options: how it is planned and read; the defaults if None. What is about writing is not looked at.
        changes: fields of `MergeOptions` by keyword, in place of those of `options`.

    Raises:
        RecipeError: the recipe cannot be run (every reason at once).
        CheckpointError: an input cannot be opened.

    Example:
        >>> model, params = load_model(open_merge("ties.yaml", memory=10**9))       # doctest: +SKIP
    """
    options = replace(options or MergeOptions(), **changes)
    plan = settled_plan(recipe, options)
    reading = {name: getattr(options, name) for name in ("memory", "threads", "allow_nonfinite")}
    made: dict[str, Mapping[str, TensorSource]] = {}
    for name, stage in plan.stages.items():
        made[name] = merged_tensors(stage.taking(made).jobs, seed=stage.seed, **reading)
    return UnwrittenMerge(plan, merged_tensors(plan.taking(made).jobs, seed=plan.seed, **reading))
