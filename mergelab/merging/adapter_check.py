"""Whether a merge of LoRA adapters alone can mean something: what their names and products say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from mergelab.checkpoints.adapter_factors import FactoredAdapter, is_adapter
from mergelab.errors import MergelabError
from mergelab.merging.adapter_merge import AdapterRecipe, read_adapter_recipe, summed_weights
from mergelab.merging.findings import MOST_SUM, MOST_TIMES, Finding
from mergelab.merging.plan.input_models import locate_adapters
from mergelab.merging.recipe.schema import Recipe

__all__ = ["check_adapters", "merges_adapters"]

_SAME = 1e-6


def merges_adapters(recipe: Recipe, base_dir: Path | None) -> bool:
    """Whether all models of a recipe are folders of adapters, named without a base."""
    names = [model.model for model in recipe.models or ()]
    if not names or recipe.merges:
        return False
    try:
        found = locate_adapters(names, recipe.origin, base_dir)
    except MergelabError:
        return False
    return all("+" not in name and is_adapter(folder) for name, folder in found.items())


def check_adapters(recipe: Recipe, base_dir: Path | None) -> tuple[list[Finding], int]:
    """Findings about a recipe of adapters alone, and how many values of each were read at most.

    Raises:
        CheckpointError: an adapter cannot be read, or cannot be merged as one.
        RecipeError: the recipe cannot be run on adapters.
    """
    read = read_adapter_recipe(recipe, base_dir)
    names = [source.model for source in read.piece.inputs]
    found = [Finding("base", sentence, "merge adapters of one model") for sentence in read.base_warnings]
    found += _coverage(names, read.adapters)
    found += _strength(read)
    gram, broken, entries = _products(read.adapters)
    found += [
        Finding(
            "nonfinite",
            f"adapter {names[i]!r} holds NaN or infinity in the factors of {module!r}",
            "repair or replace it",
            (names[i],),
        )
        for i, module in broken.items()
    ]
    sound = [i for i in range(len(names)) if i not in broken]
    found += _sizes([names[i] for i in sound], gram[np.ix_(sound, sound)])
    return found, entries


def _coverage(names: Sequence[str], adapters: Sequence[FactoredAdapter]) -> Iterator[Finding]:
    """Adapters that change other modules than the rest."""
    every = set().union(*(adapter.modules for adapter in adapters))
    for name, adapter in zip(names, adapters, strict=True):
        if lacking := sorted(every - adapter.modules.keys()):
            yield Finding(
                "config",
                f"adapter {name!r} lacks {len(lacking)} of the {len(every)} modules that are changed, such "
                f"as {lacking[0]!r}",
                "it counts as zero there, so that averages halve what the others do",
                (name,),
            )


def _strength(read: AdapterRecipe) -> Iterator[Finding]:
    total = summed_weights(read)
    if total is not None and total > MOST_SUM + 1e-6:
        yield Finding(
            "strength",
            f"the adapters' weights add up to {total:.3g}: sums of whole changes overshoot, the more of them "
            "the further",
            f"multiply the weights by {0.8 / total:.2g}, or search for it on held-out text",
        )


def _products(adapters: Sequence[FactoredAdapter]) -> tuple[np.ndarray, Mapping[int, str], int]:
    """Inner products of the adapters' changes, a module of each that is not finite, and values read."""
    count = len(adapters)
    gram, broken, entries = np.zeros((count, count)), dict[int, str](), [0] * count
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.modules):
        factors: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for i, adapter in enumerate(adapters):
            if (pair := adapter.modules.get(module)) is None:
                continue
            b, a = pair.read()
            entries[i] += b.size + a.size
            if np.isfinite(b).all() and np.isfinite(a).all():
                factors[i] = b, a
            else:
                broken.setdefault(i, module)
        for i, (b, a) in factors.items():
            for j, (other_b, other_a) in factors.items():
                gram[i, j] += np.sum((b.T @ other_b) * (a @ other_a.T))
    return gram, broken, max(entries)


def _sizes(names: Sequence[str], gram: np.ndarray) -> Iterator[Finding]:
    """Adapters that change nothing, the same as another, or far more or less than the rest."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    for name, norm in zip(names, norms, strict=True):
        if norm == 0:
            yield Finding(
                "equal", f"adapter {name!r} changes nothing: its products are zero", "omit it", (name,)
            )
    for i, j in combinations(range(len(names)), 2):
        apart = gram[i, i] + gram[j, j] - 2 * gram[i, j]
        if norms[i] > 0 and apart <= (_SAME * norms[i]) ** 2:
            yield Finding(
                "equal",
                f"adapters {names[i]!r} and {names[j]!r} make the same change",
                "omit one, or correct its path",
                (names[i], names[j]),
            )
    for i, name in enumerate(names):
        rest = [norm for j, norm in enumerate(norms) if j != i and norm > 0]
        times = norms[i] / float(np.median(rest)) if rest else 1.0
        if times > MOST_TIMES:
            yield Finding(
                "outlier",
                f"adapter {name!r} changes {times:.3g} times as much as the others, and drowns them",
                f"divide its weight by about {times:.2g}, or omit it",
                (name,),
            )
