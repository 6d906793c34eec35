"""The models of a recipe: base and parents opened as the recipe names them, and what it merges them to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints import Checkpoint
from mergelab.checkpoints.model_card import portable_name
from mergelab.errors import RecipeError
from mergelab.merging.plan.input_models import FoundModel, find_models
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.unwritten_merge import open_merge
from mergelab.models.load import load_model
from mergelab.models.model import Model, Params
from mergelab.models.streamed import Streaming, stream_model

__all__ = ["MergeInputs", "find_family", "load_one", "merged_model"]


@dataclass(frozen=True)
class MergeInputs:
    """The inputs of a merge.

    Attributes:
        recipe: the recipe.
        base: the model that all others come from.
        parents: the others, by the names they are shown by, in the recipe's order.
    """

    recipe: Recipe
    base: FoundModel
    parents: dict[str, FoundModel]


def find_family(recipe: Recipe, base: str | Path | None = None) -> MergeInputs:
    """Opens the models of a recipe.

    Args:
        recipe: one merge; the models of recipes that it builds on are not told apart.
        base: the common base, where the recipe names none.

    Raises:
        RecipeError: there is no base, no other model, or the recipe builds on the results of others.
    """
    if recipe.merges:
        raise RecipeError(
            f"{_place(recipe)} builds on the results of other recipes; explain one merge at a time, with "
            "folders in the place of results."
        )
    texts = recipe.model_texts()
    named = recipe.base_model if base is None else str(base)
    if named is None:
        raise RecipeError(
            f"{_place(recipe)} names no base_model, and what a specialist gained is told against its base; "
            "name it (base, --base)."
        )
    found = find_models({**texts, named: ("base_model",)}, recipe.origin)
    parents = [name for name in texts if name != named]
    if not parents:
        raise RecipeError(
            f"{_place(recipe)} merges no model but the base {named!r}; there is nothing to explain."
        )
    return MergeInputs(recipe, found[named], {_shown(name, parents): found[name] for name in parents})


def _place(recipe: Recipe) -> str:
    return str(recipe.origin.path or "the recipe")


def _shown(name: str, names: list[str]) -> str:
    """The last part of a path where that names one model alone."""
    short = portable_name(name.replace("\\", "/").rstrip("/")) or name
    return short if [portable_name(one) for one in names].count(short) == 1 else name


def load_one(
    checkpoint: Checkpoint, like: Model, name: str, dtype: Any = None, streamed: Streaming | None = None
) -> tuple[Model, Params]:
    """Loads a model, or opens it to be streamed, of the same shape as another.

    Raises:
        RecipeError: it has another shape or vocabulary, so that the SAE and the tokens are not its own.
    """
    if streamed is None:
        model, params = load_model(checkpoint, dtype=dtype)
    else:
        model, params = stream_model(checkpoint, dtype=dtype, **streamed._asdict())
    if (model.config.d_model, model.config.vocab_size) != (like.config.d_model, like.config.vocab_size):
        raise RecipeError(
            f"{name} is {model.config.d_model} wide with {model.config.vocab_size:,} tokens, and the base "
            f"{like.config.d_model} wide with {like.config.vocab_size:,}; one SAE reads models of one shape."
        )
    return model, params


def merged_model(
    recipe: Recipe, like: Model, dtype: Any = None, streamed: Streaming | None = None
) -> tuple[Model, Params]:
    """The merge, loaded without being written; arguments and errors are those of `load_one`."""
    return load_one(open_merge(recipe), like, "the merge", dtype, streamed)
