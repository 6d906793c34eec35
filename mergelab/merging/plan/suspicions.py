"""What a plan warns of: factors beyond 1.5, models of another origin than the base, outlying siblings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mergelab.checkpoints import TensorSource, is_float
from mergelab.merging.engine.job import Job
from mergelab.merging.vocabulary.embedding_rows import is_token_tensor
from mergelab.operators.declare import Operator

__all__ = ["FactorsSeen", "odd_relations"]

MOST_FACTOR = 1.5
"""Extrapolation beyond this rarely helps (ExPO's own best values lie below it)."""

LEAST_COSINE = 0.25
"""Between a matrix of a model and the base's; fine-tunes have .9 and more, independent models about 0."""

MOST_TIMES = 20.0
"""How many times the median sibling's change a model's may be."""

_TENSORS, _ELEMENTS, _GROUPS = 16, 4096, 4
_EQUAL = 1e-6  # a change this small beside the base is none
_NUMBER = re.compile(r"\.(\d{1,9})\.")


@dataclass
class FactorsSeen:
    """How strongly each model enters, collected job by job.

    Attributes:
        found: findings for each model and parameter, the largest factor beyond the limit, and the tensors it
            is for.
        most: largest sum of the weights of several models that are added up, and the parameter; 0 where none
            are.
    """

    most: tuple[float, str] = (0.0, "")
    found: dict[tuple[str, str], tuple[float, list[str]]] = field(default_factory=dict)

    def add(
        self, operator: Operator, arguments: Mapping[str, Any], models: Sequence[str], tensor: str
    ) -> None:
        """Notes the factors of one tensor's models."""
        parameter, factors, summed = _factors(operator, arguments, len(models))
        if summed and len(factors) > 1:
            self.most = max(self.most, (math.fsum(factors), parameter))
        for model, factor in zip(models, factors, strict=False):
            if abs(factor) > MOST_FACTOR + 1e-6:
                largest, names = self.found.get((model, parameter), (0.0, []))
                self.found[model, parameter] = (max(largest, factor, key=abs), [*names, tensor])

    def sentences(self) -> list[str]:
        """One per model."""
        found = []
        for (model, parameter), (factor, names) in self.found.items():
            tensors = (
                f"tensor {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors ({names[0]!r}, ...)"
            )
            found.append(
                f"model {model!r} enters {tensors} {factor:.3g}-fold, by {parameter}: beyond {MOST_FACTOR:g} "
                "a merge is usually worse than its models; lower it unless that is what you are after"
            )
        return found


def _factors(operator: Operator, arguments: Mapping[str, Any], models: int) -> tuple[str, list[float], bool]:
    """The parameter that says how strongly models enter, what each one's weights or change is times, and
    whether the models are added up with these factors as they are.
    """

    def value(keyword: str, otherwise: Any) -> Any:
        declared = next((p for p in operator.parameters if p.keyword == keyword), None)
        default = otherwise if declared is None or declared.required else declared.default
        given = arguments.get(keyword, default)
        return otherwise if given is None else given

    declared = next((p for p in operator.parameters if p.keyword == operator.strength), None)
    if declared is not None and not declared.per_model:
        factor = value(operator.strength, 1.0)
        one = next((f for f in factor if f is not None), 1.0) if isinstance(factor, list) else factor
        return operator.strength, [float(one)] * models, False
    weight = value(operator.strength, None)
    if weight is None:
        return "", [], False
    weights = [float(w) for w in weight] if isinstance(weight, list) else [float(weight)] * models
    scale = float(value("lambda_", 1.0))
    shared = bool(value("normalize", value("normalize_weights", operator.shares == "always")))
    if shared:
        total = math.fsum(weights)
        # An election divides by the weights that won, so no share exceeds 1.
        if operator.shares == "elected":
            weights = [1.0] * models
        elif abs(total) > 1e-8:
            weights = [w / total for w in weights]
    named = "weight" if scale == 1 else "weight and lambda"
    return named, [w * scale for w in weights], not shared


def odd_relations(jobs: Iterable[Job], base: str | None, unread: Iterable[str]) -> list[str]:
    """Compares a few thousand values of up to 16 matrices of each model with the base's.

    A model whose median cosine with the base is below 0.25 has nothing of it. A model's change is an outlier
    if its norm is above 20 times the median of the others'; without a base, changes are from the median of
    three models or more.

    Args:
        jobs: what is to be made.
        base: the recipe's base model.
        unread: models that cannot be read yet, being results of merges to come.
    """
    skipped = set(unread)
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if _tells_something(job) and not skipped.intersection(job.model_names):
            groups.setdefault(job.model_names, []).append(job)
    found: list[str] = []
    for names, group in islice(groups.items(), _GROUPS):
        step = -(-len(group) // _TENSORS)
        samples = [s for job in group[::step] if (s := _sample(job)) is not None]
        if samples:
            found += _relations(list(names), samples, base)
    return list(dict.fromkeys(found))


def _tells_something(job: Job) -> bool:
    sources = _inputs(job)
    numbers = {m[1] if (m := _NUMBER.search(source.name)) else None for source in sources}
    return (
        job.merge is not None
        and len(sources) > 1
        and len(sources) == len(job.model_names)
        and len(job.shape) > 1
        and job.size >= 16
        and len(numbers) == 1  # layers of different places are unlike in one model too
        and not is_token_tensor(job.name)
        and all(is_float(source.dtype) for source in sources)
    )


def _inputs(job: Job) -> list[TensorSource]:
    return [*job.sources, *(() if job.base is None else (job.base,))]


def _sample(job: Job) -> np.ndarray | None:
    """`[models, values]` from the middle of the tensor; None where some are not finite."""
    count = min(_ELEMENTS, job.size)
    start = (job.size - count) // 2
    rows = []
    for source in _inputs(job):
        values = np.empty(count, source.dtype)
        source.read_into(start, values)
        rows.append(values.astype(np.float64))
    sample = np.stack(rows)
    return sample if np.isfinite(sample).all() else None


def _relations(names: list[str], samples: list[np.ndarray], base: str | None) -> list[str]:
    if base in names:
        reference = names.index(base)
        origins = [sample[reference] for sample in samples]
        others = [i for i in range(len(names)) if i != reference]
        found = _strangers(names, samples, reference)
    elif len(names) > 2:
        origins = [np.median(sample, axis=0) for sample in samples]
        others, found = list(range(len(names))), []
    else:
        return []
    size = math.sqrt(sum(float(origin @ origin) for origin in origins))
    changes = {
        i: math.sqrt(sum(float(np.sum((s[i] - o) ** 2)) for s, o in zip(samples, origins, strict=True)))
        for i in others
    }
    changed = {i: change for i, change in changes.items() if change > _EQUAL * size}
    for i, change in changed.items():
        rest = [other for j, other in changed.items() if j != i]
        times = change / float(np.median(rest)) if rest else 0.0
        if times > MOST_TIMES:
            found.append(
                f"the change of model {names[i]!r} is {times:.0f} times that of the other models: it will "
                "drown theirs; lower its weight, or omit it"
            )
    return found


def _strangers(names: list[str], samples: list[np.ndarray], base: int) -> list[str]:
    found = []
    for i in range(len(names)):
        measured = [c for sample in samples if (c := _cosine(sample[i], sample[base])) is not None]
        if measured and (cosine := float(np.median(measured))) < LEAST_COSINE:
            found.append(
                f"model {names[i]!r} does not seem to descend from the base {names[base]!r} (the cosine of "
                f"their weights is {cosine:.2f}): a merge helps only models of one origin"
            )
    return found


def _cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else None
