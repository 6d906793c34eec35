"""Whether a merge can mean something: what its recipe and its models' weights say, each with a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.checkpoints import Checkpoint, FolderCheckpoint, is_float
from mergelab.errors import MergelabError, RecipeError
from mergelab.merging.adapter_check import check_adapters, merges_adapters
from mergelab.merging.diff.block_sums import Sums
from mergelab.merging.diff.descent import KIN, find_base
from mergelab.merging.diff.measures import added, relations_of
from mergelab.merging.diff.pairs import MatchedTensor, is_matrix
from mergelab.merging.diff.streaming import Gathered, gather
from mergelab.merging.engine.job import Job
from mergelab.merging.findings import MOST_SUM, MOST_TIMES, Finding
from mergelab.merging.plan.input_models import find_models, is_planned
from mergelab.merging.plan.output_config import config_differences
from mergelab.merging.plan.planner import Plan, plan_merge
from mergelab.merging.plan.suspicions import odd_relations
from mergelab.merging.recipe.recipe_file import load_recipe
from mergelab.merging.recipe.schema import Recipe
from mergelab.merging.recipe.settings import Setting
from mergelab.merging.vocabulary.chat_templates import read_chat_template
from mergelab.merging.vocabulary.tokenizer_data import vocabulary_differences
from mergelab.operators import OPERATORS

__all__ = ["RecipeCheck", "check_recipe"]

_SAMPLE = 1 << 14
_MOST_CHANGE = 0.5


@dataclass(frozen=True)
class RecipeCheck:
    """The result of a check.

    Attributes:
        findings: What was found, the gravest first.
        models: Models of the recipe.
        entries: Number of weights that were read, of each model.
        full: Whether all weights were read.
    """

    findings: tuple[Finding, ...]
    models: tuple[str, ...]
    entries: int
    full: bool

    def as_data(self) -> dict[str, Any]:
        """Plain data, as `mergelab check --json` prints it."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "models": list(self.models),
            "entries": self.entries,
            "full": self.full,
        }


def check_recipe(
    recipe: Recipe | str | Path,
    *,
    base_dir: str | Path | None = None,
    full: bool = False,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> RecipeCheck:
    """Checks a recipe and the models that it merges.

    Args:
        recipe: Recipe, or the path of one; the recipes it builds on are checked too.
        base_dir: Folder where relative model paths are looked up after the working directory.
        full: Whether all weights are read; by default 16,384 of each tensor are, spread over it.
        threads: Threads that read.
        progress: Function called with the number of bytes just read, where all are.

    Raises:
        RecipeError: the recipe cannot be read, or a model cannot be found.
        CheckpointError: a model cannot be read.

    Example:
        >>> [finding.kind for finding in check_recipe("ties.yaml").findings]       # doctest: +SKIP
        ['outlier']
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = None if base_dir is None else Path(base_dir)
    if merges_adapters(recipe, folder):
        said, entries = check_adapters(recipe, folder)
        unique = dict.fromkeys([*_of_recipe(recipe), *said])
        names = tuple(model.model for model in recipe.models or ())
        return RecipeCheck(tuple(sorted(unique, key=_gravity)), names, entries, True)
    stages = {each.name for each in recipe.merges if each.name is not None}
    every = [*recipe.merges, recipe]
    opened: dict[str, Checkpoint] = {}
    for each in every:
        wanted = {
            text: place for text, place in each.referenced().items() if text.split("+")[0] not in stages
        }
        found_models = find_models(wanted, recipe.origin, folder)
        opened |= {name: model.checkpoint for name, model in found_models.items()}
    findings = [finding for each in every for finding in _of_recipe(each)]
    findings += _quantized(opened)
    entries = 0
    try:
        plan = plan_merge(recipe, base_dir=folder)
    except RecipeError as error:
        findings += [Finding("refused", fault) for fault in error.faults]
    else:
        for each in (*plan.stages.values(), plan):
            findings += _of_plan(each)
            more, read = _of_weights(each, full, threads, progress)
            findings += more
            entries = max(entries, read)
    unique = list(dict.fromkeys(findings))
    return RecipeCheck(tuple(sorted(unique, key=_gravity)), tuple(opened), entries, full)


_ORDER = ("refused", "nonfinite", "origin", "base", "equal", "vocabulary", "rows", "outlier", "strength")


def _gravity(finding: Finding) -> int:
    return _ORDER.index(finding.kind) if finding.kind in _ORDER else len(_ORDER)


def _of_recipe(recipe: Recipe) -> Iterator[Finding]:
    """What the numbers say without the models."""
    operator = OPERATORS.get(recipe.merge_method)
    takes = {parameter.keyword for parameter in operator.parameters} if operator else set[str]()
    for _, _, part in recipe.parts():
        sources = [*(part.models or ()), *(s for piece in part.slices or () for s in piece.sources)]
        names = [model.model for model in part.models or ()]
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            yield Finding(
                "equal", f"model {name!r} is listed {names.count(name)} times", "list it once", (name,)
            )
        zeros = [s.model for s in sources if _all_equal(s.parameters.get("weight"), 0)]
        for name in dict.fromkeys(zeros):
            yield Finding(
                "weight",
                f"model {name!r} has the weight 0",
                "it adds nothing; give it a weight, or omit it",
                (name,),
            )
        if "density" in takes:
            scopes = [
                ("", recipe.parameters),
                ("", part.parameters),
                *((s.model, s.parameters) for s in sources),
            ]
            for name, parameters in scopes:
                yield from _density(recipe.merge_method, name, parameters.get("density"))
    for keyword, ends in (("t", (0, 1)), ("alpha", (0,))):
        value = recipe.parameters.get(keyword)
        if keyword in takes and any(_all_equal(value, end) for end in ends):
            yield Finding(
                "weight",
                f"{keyword} is {_number(value):g} for every tensor",
                f"the result is one of the models; take a value between {ends[0]} and 1",
            )


def _density(method: str, model: str, setting: Setting | None) -> Iterator[Finding]:
    whose = f" of model {model!r}" if model else ""
    about = (model,) if model else ()
    if _all_equal(setting, 1):
        yield Finding(
            "density",
            f"the density{whose} is 1: {method} drops nothing of its task vector",
            "give the fraction of entries to keep, such as 0.2 for ties or 0.5 for dare_ties",
            about,
        )
    if _all_equal(setting, 0):
        yield Finding(
            "density",
            f"the density{whose} is 0: {method} drops all of its task vector",
            "give the fraction of entries to keep, such as 0.2",
            about,
        )


def _all_equal(setting: Setting | None, value: float) -> bool:
    if setting is None:
        return False
    written = setting.scalars()
    return bool(written) and all(type(v) in (int, float) and v == value for v in written)


def _number(setting: Setting | None) -> float:
    return math.nan if setting is None else float(setting.scalars()[0] or 0)


def _quantized(opened: Mapping[str, Checkpoint]) -> Iterator[Finding]:
    for name, checkpoint in opened.items():
        if isinstance(checkpoint, FolderCheckpoint) and checkpoint.is_quantized:
            yield Finding(
                "quantized",
                f"model {name!r} is quantized: its rounding is a part of its task vector, and often the "
                "larger one",
                "merge the unquantized models, and quantize the result",
                (name,),
            )


def _of_plan(plan: Plan) -> Iterator[Finding]:
    """The plan's own warnings, each with its kind, and what its models' small files say."""
    models = {model.name: model.checkpoint for model in plan.models}
    base = plan.recipe.base_model
    relations = set(odd_relations(plan.jobs, base, _unread(plan)))  # told below, with more of the weights
    vocabulary = set[str]()
    if plan.recipe.vocabulary is None:
        vocabulary = set(vocabulary_differences(models, base))
    donor = base if base is not None else next(iter(models))
    settings = set(config_differences({name: c.config for name, c in models.items()}, donor))
    for warning in plan.warnings:
        if warning not in relations:
            kind = "vocabulary" if warning in vocabulary else "config" if warning in settings else "plan"
            yield Finding("strength" if "-fold, by " in warning else kind, warning)
    total, parameter = plan.summed_weights
    if total > MOST_SUM + 1e-6:
        yield Finding(
            "strength",
            f"the models' weights add up to {total:.3g} (by {parameter}): sums of whole task vectors "
            "overshoot, the more of them the further",
            f"most merges are best at a sum between 0.5 and 1; multiply the weights by {0.8 / total:.2g}, or "
            "search for it on held-out text",
        )
    if plan.recipe.chat_template is None:
        yield from _templates(models, donor)


def _templates(models: Mapping[str, Checkpoint], donor: str) -> Iterator[Finding]:
    found: dict[str, str | None] = {}
    for name, checkpoint in models.items():
        if is_planned(checkpoint):
            continue
        try:
            found[name] = read_chat_template(checkpoint.path)
        except MergelabError as error:
            yield Finding("chat_template", str(error), "", (name,))
    wanted = found.get(donor)
    unlike = [name for name, t in found.items() if t is not None and t.strip() != (wanted or "").strip()]
    if unlike:
        has = "has another" if wanted is not None else "has none"
        yield Finding(
            "chat_template",
            f"{', '.join(map(repr, unlike))} {'has a' if len(unlike) == 1 else 'have'} chat template"
            f"{'s' * (len(unlike) > 1)} and {donor!r}, whose files the merge takes, {has}: prompts will not "
            "look as in training",
            "set chat_template: auto, or to the one that most models were tuned with",
            tuple(unlike),
        )


def _unread(plan: Plan) -> list[str]:
    return [
        model.name
        for model in plan.models
        if is_planned(model.checkpoint) or getattr(model.checkpoint, "decomposes", False)
    ]


def _of_weights(
    plan: Plan, full: bool, threads: int | None, progress: Callable[[int], object]
) -> tuple[list[Finding], int]:
    """What the weights say, and how many of each model were read."""
    unread = set(_unread(plan))
    groups: dict[tuple[str, ...], list[MatchedTensor]] = {}
    for job in plan.jobs:
        if _comparable(job) and not unread.intersection(job.model_names):
            groups.setdefault(job.model_names, []).append(MatchedTensor(job.name, job.inputs))
    found: list[Finding] = []
    entries = 0
    base = plan.recipe.base_model
    for names, tensors in groups.items():
        reference = names.index(base) if base in names else 0
        every = list(
            gather(tensors, reference, full=full, sample=_SAMPLE, threads=threads, progress=progress)
        )
        entries += sum(each.sums.count for each in every)
        found += _of_group(names, base if base in names else None, every, reference)
    return found, entries


def _comparable(job: Job) -> bool:
    return (
        len(job.inputs) > 1
        and len(job.inputs) == len(job.model_names)
        and len(set(job.model_names)) == len(job.model_names)
        and job.size > 0
        and all(is_float(source.dtype) for source in job.inputs)
    )


def _of_group(
    names: tuple[str, ...], base: str | None, every: Sequence[Gathered], reference: int
) -> Iterator[Finding]:
    whole = added(each.sums for each in every)
    yield from _nonfinite(names, every)
    finite = [each for each in every if not each.sums.nonfinite.any()]
    if not finite:
        return
    matrices = [each.sums for each in finite if is_matrix(each.tensor)] or [each.sums for each in finite]
    yield from _equal(names, base, whole, reference)
    descent = find_base(names, matrices, reference, base)
    # What is strange to the base is strange to its kin too.
    for a, b in [pair for pair in descent.strangers if base in pair] or descent.strangers:
        yield Finding(
            "origin",
            f"the weights of {a!r} and {b!r} have nothing in common (cosine below {KIN:g})",
            "merge models that were tuned from one base"
            if base not in (a, b)
            else f"take the base that {(b if base == a else a)!r} was tuned from",
            (a, b),
        )
    if base is not None:
        for doubt in descent.doubts:
            if "nothing in common" not in doubt:
                yield Finding("base", doubt, "", (base,))
    strange = {name for pair in descent.strangers for name in pair}
    yield from _rows(names, finite, reference, strange)
    yield from _changes(names, base, matrices, reference, strange)


def _nonfinite(names: Sequence[str], every: Sequence[Gathered]) -> Iterator[Finding]:
    for i, name in enumerate(names):
        odd = {each.tensor.name: int(n) for each in every if (n := each.sums.nonfinite[i])}
        if odd:
            worst = max(odd, key=lambda tensor: odd[tensor])
            yield Finding(
                "nonfinite",
                f"model {name!r} holds NaN or infinity in {len(odd)} tensor(s), such as {worst!r} "
                f"({odd[worst]:,} of the values read)",
                "repair or replace that checkpoint",
                (name,),
            )


def _equal(names: Sequence[str], base: str | None, whole: Sums, reference: int) -> Iterator[Finding]:
    relations = relations_of(whole, names, reference, has_base=False)
    for pair in relations.pairs:
        if pair.relative_change == 0:
            a, b = pair.model, pair.other
            if base in (a, b):
                other = b if base == a else a
                said, remedy = f"model {other!r} equals the base {base!r}: its task vector is zero", "omit it"
            else:
                said, remedy = (
                    f"models {a!r} and {b!r} have the same weights",
                    "omit one, or correct its path",
                )
            yield Finding("equal", said, remedy, (a, b))


def _rows(
    names: Sequence[str], every: Sequence[Gathered], reference: int, strange: set[str]
) -> Iterator[Finding]:
    for each in every:
        if not each.tensor.has_tokens:
            continue
        for pair in relations_of(each.sums, names, reference, has_base=False).pairs:
            if (
                pair.cosine is not None
                and pair.cosine < KIN
                and not strange.intersection((pair.model, pair.other))
            ):
                yield Finding(
                    "rows",
                    f"tensor {each.tensor.name!r} of {pair.model!r} and {pair.other!r} has a cosine of "
                    f"{pair.cosine:.2f} though their other weights are related: its rows belong to different "
                    "tokens",
                    "check the tokenizer files of both, and set tokenizer_source: union",
                    (pair.model, pair.other),
                )


def _changes(
    names: Sequence[str], base: str | None, matrices: Sequence[Sums], reference: int, strange: set[str]
) -> Iterator[Finding]:
    """Models that are far from the base or, where there is none, from the nearest of two others or more."""
    if base is None and len(names) < 3:
        return
    others = [i for i in range(len(names)) if base is None or i != reference]
    changes = {
        names[i]: size
        for i, size in zip(others, _sizes(matrices, len(names), reference, base is None), strict=True)
        if names[i] not in strange
    }
    from_where = f"from the base {base!r}" if base is not None else "from the nearest other model"
    moved = {name: change for name, change in changes.items() if change > 1e-6}
    for name, change in moved.items():
        if change > _MOST_CHANGE:
            yield Finding(
                "distance",
                f"model {name!r} is {change:.0%} of the weights' norm away {from_where}: it was trained on "
                "for long, or with a large learning rate",
                "merge nearer models, or give it a small weight",
                (name,),
            )
        rest = [other for mate, other in moved.items() if mate != name]
        times = change / float(np.median(rest)) if rest else 1.0
        if times > MOST_TIMES:
            yield Finding(
                "outlier",
                f"model {name!r} changed {times:.3g} times as much as the others ({change:.2%} of the "
                "weights' norm): it was tuned with another learning rate or for longer, and drowns theirs",
                f"divide its weight by about {times:.2g}, or omit it",
                (name,),
            )
        elif len(rest) > 1 and times < 1 / MOST_TIMES:
            yield Finding(
                "outlier",
                f"model {name!r} changed {1 / times:.3g} times less than the others ({change:.2%} of the "
                "weights' norm), which drown it",
                "raise its weight, or omit it",
                (name,),
            )


def _sizes(matrices: Sequence[Sums], models: int, reference: int, nearest: bool) -> list[float]:
    """Relative changes: from the reference, of the others in order; or of all from the nearest other one."""
    gram = np.sum([each.gram[:models, :models] for each in matrices], axis=0)
    size = math.sqrt(max(float(gram[0, 0]), 1e-300))
    if not nearest:
        return [math.sqrt(max(float(gram[k, k]), 0.0)) / size for k in range(1, models)]
    shifts = gram.copy()
    shifts[0, :] = shifts[:, 0] = 0
    squares = np.diag(shifts)[:, None] + np.diag(shifts)[None] - 2 * shifts
    np.fill_diagonal(squares, np.inf)
    found = np.sqrt(np.maximum(squares.min(axis=1), 0)) / size
    order = [reference, *(i for i in range(models) if i != reference)]
    return [float(found[order.index(i)]) for i in range(models)]
