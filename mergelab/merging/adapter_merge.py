"""LoRA adapters to one LoRA adapter: operators on the products B A, the result as factors again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import dtype_from_name
from mergelab.checkpoints.adapter_factors import FactoredAdapter, FactorPair, read_factors
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.model_card import CardFacts, portable_name, short_card
from mergelab.checkpoints.output_target import MARKER
from mergelab.checkpoints.peft import adapter_config
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.writer import identity_digest
from mergelab.errors import CheckpointError, MergelabError, NonFiniteError, RecipeError
from mergelab.merging.engine.job import Job
from mergelab.merging.engine.output_folder import write_model
from mergelab.merging.plan.input_models import locate_adapters
from mergelab.merging.recipe.faults import raise_faults
from mergelab.merging.recipe.recipe_file import load_recipe, recipe_yaml
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.scopes import ScopedSlice, ScopedSource, recipe_faults, resolve, scoped_parts
from mergelab.operators import OPERATORS
from mergelab.operators.compose import Merge
from mergelab.operators.reductions import Mean, WeightedSum
from mergelab.trees import depths
from mergelab.version import __version__

__all__ = ["AdapterRecipe", "MergedAdapter", "merge_adapters", "read_adapter_recipe", "summed_weights"]

_STEM = "adapter_model"


@dataclass(frozen=True)
class MergedAdapter:
    """What a merge of adapters wrote.

    Attributes:
        out: Folder of the adapter.
        ranks: Rank of every module's factors.
        errors: Relative error of every module, the norm of what its factors miss over the norm of the merged
            change.
        nbytes: Size of the weight file.
        warnings: Sentences that the user should know, one each.
    """

    out: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    nbytes: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterRecipe:
    """A recipe of adapters, opened.

    Attributes:
        recipe: The recipe.
        piece: Its models, with their settings.
        folders: Folders of the adapters, by their references.
        adapters: The adapters, in the recipe's order.
        shapes: Shape of each module's change; the modules in their order in the files.
    """

    recipe: Recipe
    piece: ScopedSlice
    folders: Mapping[str, Path]
    adapters: Sequence[FactoredAdapter]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def base_warnings(self) -> tuple[str, ...]:
        """A sentence where the adapters name different bases."""
        return _base_warnings(self.recipe, self.adapters)


def read_adapter_recipe(recipe: Recipe, base_dir: str | Path | None = None) -> AdapterRecipe:
    """Opens the adapters that a recipe merges.

    Raises:
        RecipeError: the recipe cannot be run on adapters.
        CheckpointError: an adapter is not one of products alone, or two are of unlike models.
    """
    raise_faults(recipe.origin.sentence(*fault) for fault in recipe_faults(recipe))
    piece = _models_of(recipe)
    folders = locate_adapters([s.model for s in piece.inputs], recipe.origin, base_dir)
    adapters = _opened([folders[source.model] for source in piece.inputs])
    return AdapterRecipe(recipe, piece, folders, adapters, _module_shapes(adapters))


def summed_weights(read: AdapterRecipe) -> float | None:
    """The sum of the factors that the adapters' changes are added with, where that is what a merge does."""
    module = next(iter(read.shapes), None)
    if module is None:
        return None
    shares = _shares(_merge_of(read.recipe, read.piece, module, 0.5), len(read.adapters))
    return None if shares is None else float(np.abs(shares).sum())


@dataclass(frozen=True)
class _InMemoryTensor:
    """A `TensorSource` of an array in memory."""

    name: str
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with flat elements `[start, start + out.size)`."""
        out[:] = self.array.reshape(-1)[start : start + out.size]


@writes_anywhere()
def merge_adapters(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    rank: int,
    seed: int = 0,
    dtype: str | None = None,
    base_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> MergedAdapter:
    """Merges LoRA adapters as a recipe says and writes one LoRA adapter of PEFT's.

    The recipe's models are adapters (`adapters/a`, or `base+adapters/a`, of which the base is not read); its
    base model, where the operator needs one, is named for the result and not read either: adapters are
    differences already. Operators see each module's product `scale B A`; weights therefore apply to products,
    not to factors. A module that an adapter lacks is zero there.

    Sums and averages are computed from the factors in float64, by QR, and are exact up to `rank`; other
    operators (`knots`, `core_space`, `ties`, ...) act on the products themselves, one module at a time. Each
    result is cut to its `rank` largest singular triples. The factors hold it whole: `lora_alpha` is the rank,
    so that the scale is 1.

    Args:
        recipe: Recipe, or path of one, without `slices` and `modules`.
        out: Folder to write; it appears only when complete.
        rank: Largest rank of a module's factors.
        seed: Seed of every random draw.
        dtype: Stored dtype of the factors; the recipe's, or float32, if None.
        base_dir: Folder where relative paths are looked up after the working directory.
        overwrite: Whether a non-empty `out` that mergelab wrote may be replaced.
        progress: Function called with how many modules have just been merged.

    Raises:
        RecipeError: the recipe cannot be run on adapters.
        CheckpointError: an adapter is not one of products alone, or two are of unlike models.
        OutputError: the folder cannot be written.
    """
    if rank < 1:
        raise RecipeError(f"the rank is {rank} where at least 1 was expected.")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    opened = read_adapter_recipe(recipe, base_dir)
    piece, folders, adapters, shapes = opened.piece, opened.folders, opened.adapters, opened.shapes
    stored = dtype_from_name(dtype or recipe.out_dtype or recipe.dtype or "float32")
    identity = {
        "recipe": recipe_yaml(recipe),
        "settings": f"{rank} {seed} {stored}",
        "models": " ".join(adapter.digest for adapter in adapters),
    }
    with WorkFolder(out, inputs=list(folders.values()), overwrite=overwrite) as work:
        warnings = _base_warnings(recipe, adapters)
        if work.finished(identity_digest(identity)):
            return _recorded(work.out, warnings)
        work.prepare()
        jobs, ranks, errors = [], {}, {}
        depth = dict(zip(shapes, depths([f"{module}." for module in shapes]), strict=True))
        for module, shape in shapes.items():
            pairs = [adapter.modules.get(module) for adapter in adapters]
            merge = _merge_of(recipe, piece, module, depth[module])
            b, a, errors[module] = _merged(merge, module, pairs, shape, rank, seed)
            ranks[module] = b.shape[1]
            names = next(pair.names for pair in pairs if pair is not None)
            for name, factor in zip(names, (b, a), strict=True):
                held = _InMemoryTensor(
                    f"base_model.model.{module}.{name}", np.ascontiguousarray(factor.astype(stored))
                )
                jobs.append(Job(held.name, held.shape, held.dtype, (held,)))
            progress(1)
        config = _config(recipe, adapters, ranks)

        def files(digests: Mapping[str, str]) -> dict[str, bytes]:
            facts = {"mergelab": __version__, "identity": identity_digest(identity), "tensors": dict(digests)}
            told = {"ranks": ranks, "errors": errors}
            return {
                "adapter_config.json": _text(config),
                MARKER: _text({**facts, "merged": told}),
                "README.md": _card(recipe, adapters, config, ranks, errors),
            }

        size = 1 + sum(job.bytes_out for job in jobs)  # PEFT reads adapters of one file
        write_model(work, jobs, {}, identity, files, shard_bytes=size, stem=_STEM)
        return _recorded(work.out, warnings)


def _recorded(out: Path, warnings: tuple[str, ...]) -> MergedAdapter:
    """What a merge that has been published has written about itself."""
    facts = read_json_object(out / MARKER)["merged"]
    nbytes = (out / f"{_STEM}.safetensors").stat().st_size
    return MergedAdapter(out, facts["ranks"], facts["errors"], nbytes, warnings)


def _models_of(recipe: Recipe) -> ScopedSlice:
    """The recipe's models; anything but a list of them cannot be told of adapters."""
    operator = OPERATORS[recipe.merge_method]
    faults = []
    if recipe.merges:
        faults.append("it builds on other recipes")
    if recipe.slices is not None or recipe.modules is not None:
        faults.append("it has slices or modules")
    if recipe.tokenizer is not None or recipe.tokenizer_source is not None:
        faults.append("it makes a tokenizer")
    if operator.statistics is not None:
        faults.append(f"{operator.name!r} takes statistics")
    if faults:
        raise RecipeError(f"adapters are merged by a list of models alone, but {' and '.join(faults)}.")
    return scoped_parts(recipe, operator)[None][0]


def _opened(folders: Sequence[Path]) -> list[FactoredAdapter]:
    adapters, faults = [], []
    for folder in folders:
        try:
            adapters.append(read_factors(folder))
        except MergelabError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(" ".join(faults) if len(faults) == 1 else "\n".join(faults))
    if len({adapter.config.fan_in_fan_out for adapter in adapters}) > 1:
        raise CheckpointError(
            f"{adapters[0].folder} and others differ in fan_in_fan_out, so their factors are of matrices "
            "that lie the other way round; merge adapters of one model"
        )
    return adapters


def _module_shapes(adapters: Sequence[FactoredAdapter]) -> dict[str, tuple[int, int]]:
    """The shape of each module's change; the modules in their order in the files."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for module, pair in adapter.modules.items():
            if shapes.setdefault(module, pair.shape) != pair.shape:
                raise CheckpointError(
                    f"{adapter.folder}: module {module!r} is changed by {list(pair.shape)}, and by "
                    f"{list(shapes[module])} in {adapters[0].folder}; merge adapters of one model"
                )
    return shapes


def _merge_of(recipe: Recipe, piece: ScopedSlice, module: str, depth: float) -> Merge:
    operator, name = OPERATORS[recipe.merge_method], f"{module}.weight"
    inputs: list[tuple[ScopedSource, str]] = [(source, name) for source in piece.inputs]
    return operator(**resolve(operator, piece, inputs, name, depth))


def _merged(
    merge: Merge,
    module: str,
    pairs: Sequence[FactorPair | None],
    shape: tuple[int, int],
    rank: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """`B`, `A`, and the relative error of their product."""
    read = [None if pair is None else pair.read() for pair in pairs]
    for pair, factors in zip(pairs, read, strict=True):
        if factors is not None and pair is not None and not all(np.isfinite(f).all() for f in factors):
            raise NonFiniteError(f"the factors of module {module!r} hold NaN or infinity; repair the adapter")
    there = [factors for factors in read if factors is not None]
    shares = _shares(merge, len(pairs))
    if shares is not None:
        weights = [share for share, factors in zip(shares, read, strict=True) if factors is not None]
        left = np.concatenate([w * b for w, (b, _) in zip(weights, there, strict=True)], axis=1)
        return _cut(left, np.concatenate([a for _, a in there], axis=0), rank)
    name = f"{module}.weight"
    products = [{name: np.float32(np.zeros(shape) if f is None else f[0] @ f[1])} for f in read]
    base = {name: np.zeros(shape, np.float32)} if merge.inputs.base != "as_input" else None
    change = np.asarray(merge(products, base, seed=seed)[name], np.float64)
    # Most merges of low-rank changes stay within their columns or rows, where little is left to decompose.
    columns = np.linalg.qr(np.concatenate([b for b, _ in there], axis=1))[0]
    rows = np.linalg.qr(np.concatenate([a for _, a in there], axis=0).T)[0].T
    for left, right in ((columns, columns.T @ change), (change @ rows.T, rows)):
        if np.linalg.norm(change - left @ right) <= 1e-6 * np.linalg.norm(change):
            return _cut(left, right, rank)
    return _cut(change, np.eye(shape[1]), rank)


def _shares(merge: Merge, count: int) -> np.ndarray | None:
    """The factors of a merge that is a weighted sum; None for any other."""
    if merge.stages or not isinstance(merge.reduce, WeightedSum | Mean):
        return None
    # What such a merge makes of unit vectors is its coefficients.
    units = [{"t": row} for row in np.eye(count, dtype=np.float32)]
    base = {"t": np.zeros(count, np.float32)} if merge.inputs.base != "as_input" else None
    return np.asarray(merge(units, base)["t"], np.float64)


def _cut(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors of at most `rank` of `left @ right`, of equal norms, and their relative error."""
    outer, inner = np.linalg.qr(left), np.linalg.qr(right.T)
    u, singular, v = np.linalg.svd(outer[1] @ inner[1].T, full_matrices=False)
    root = np.sqrt(singular[:rank])
    total, missed = np.sum(singular**2), np.sum(singular[rank:] ** 2)
    error = float(np.sqrt(missed / total)) if total > 0 else 0.0
    return (outer[0] @ u[:, :rank]) * root, (root[:, None] * v[:rank]) @ inner[0].T, error


def _base_name(adapters: Sequence[FactoredAdapter]) -> list[str]:
    names = (adapter.fields.get("base_model_name_or_path") for adapter in adapters)
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name]


def _base_warnings(recipe: Recipe, adapters: Sequence[FactoredAdapter]) -> tuple[str, ...]:
    names = _base_name(adapters)
    if len(names) < 2:
        return ()
    return (f"the adapters were trained on different models ({', '.join(names)}), if they name them alike",)


def _config(recipe: Recipe, adapters: Sequence[FactoredAdapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of the result's `adapter_config.json`; scale 1 everywhere."""
    named = _base_name(adapters)
    base = recipe.base_model if recipe.base_model is not None else (named or [""])[0]
    kinds = {adapter.fields.get("task_type") for adapter in adapters}
    config = adapter_config(
        ranks,
        [],
        [],
        base=base,
        model_config={},
        fan_in_fan_out=adapters[0].config.fan_in_fan_out,
        with_biases=False,
        keeps_tie=False,
    )
    targets = adapters[0].fields.get("target_modules")
    same = all(adapter.fields.get("target_modules") == targets for adapter in adapters)
    alike = same and bool(targets) and len({frozenset(adapter.modules) for adapter in adapters}) == 1
    limited = any(adapter.fields.get("layers_to_transform") is not None for adapter in adapters)
    config["target_modules"] = targets if alike and not limited else list(ranks)
    config["task_type"] = kinds.pop() if len(kinds) == 1 else None
    revisions = {adapter.fields.get("revision") for adapter in adapters}
    if len(named) == 1 and len(revisions) == 1 and base == named[0] and None not in revisions:
        config["revision"] = revisions.pop()
    return config


def _card(
    recipe: Recipe,
    adapters: Sequence[FactoredAdapter],
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    errors: Mapping[str, float],
) -> bytes:
    base = config["base_model_name_or_path"]
    name = portable_name(base) if base else "a model"
    merged = ", ".join(f"`{portable_name(adapter.folder)}`" for adapter in adapters)
    said = (
        f"LoRA adapter of rank {max(ranks.values())} at most for {len(ranks)} modules of `{name}`, merged "
        f"with mergelab {__version__} by `{recipe.merge_method}` from {merged}. The factors of the worst "
        f"module miss {max(errors.values()):.2%} of its merged change."
    )
    return short_card(f"LoRA adapter for {name}", "peft", ["mergelab", "merge", "lora"], CardFacts(), [said])


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
