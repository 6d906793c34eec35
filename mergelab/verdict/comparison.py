"""Several models beside each other: what each was measured to, and the paired difference of every two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.checkpoints.source import Checkpoint
from mergelab.errors import EvaluationError
from mergelab.models.streamed import Streaming
from mergelab.report.tables import text_table
from mergelab.verdict.bootstrap import Difference, difference, resampled_sums, shown
from mergelab.verdict.evaluation import (
    Evaluation,
    Prompts,
    Tasks,
    Texts,
    gather,
    measure,
    model_name,
    subjects_of,
)

if TYPE_CHECKING:
    from mergelab.merging.recipe.schema import Recipe

__all__ = ["Comparison", "compare_models", "paired", "short_names"]

_COLUMNS = {
    "bits_per_byte": "bits per byte",
    "accuracy": "next token",
    "tasks.accuracy": "choices",
    "tasks.accuracy_per_byte": "choices per byte",
    "answers.new_tokens": "new tokens",
    "answers.ended": "ended",
    "answers.thinking_closed": "thinking closed",
}


@dataclass(frozen=True)
class Comparison:
    """What several models were measured to on the same units.

    Attributes:
        evaluations: one for each model, in the order in which they were named.
    """

    evaluations: tuple[Evaluation, ...]

    @cached_property
    def differences(self) -> tuple[tuple[str, str, dict[str, Difference]], ...]:
        """Every two models, and how far the second is from the first in every figure."""
        return tuple((a.name, b.name, paired(a, b)) for a, b in combinations(self.evaluations, 2))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `models`, each with its figures, and `differences`, each of two models."""
        return {
            "models": [one.to_dict() for one in self.evaluations],
            "differences": [
                {"models": [a, b], **_nested({name: one.to_dict() for name, one in found.items()})}
                for a, b, found in self.differences
            ],
        }

    def table(self) -> str:
        """Figures with their intervals, and differences with their probabilities, as lines for a reader."""
        flat = [_flat(one.to_dict()) for one in self.evaluations]
        names = [name for name in _COLUMNS if all(name in one for one in flat)]
        short = short_names([one.name for one in self.evaluations])
        rows = [[short[str(one["model"])], *(shown(one[name]) for name in names)] for one in flat]
        lines = [text_table(["model", *(_COLUMNS[name] for name in names)], rows)]
        if self.differences:
            rows = [
                [f"{short[b]} - {short[a]}", *(_with_p(found[name]) for name in names)]
                for a, b, found in self.differences
            ]
            lines += ["", text_table(["paired difference", *(_COLUMNS[name] for name in names)], rows)]
        return "\n".join(lines)


def compare_models(
    models: Sequence[str | Path | Checkpoint | Recipe | Evaluation],
    *,
    text: Texts | None = None,
    tasks: Tasks | None = None,
    prompts: Prompts | None = None,
    adapters: Sequence[str | Path] = (),
    dtype: Any = None,
    streamed: Streaming | None = None,
    progress: Callable[[str], object] = lambda name: None,
    note: Callable[[str], object] = lambda sentence: None,
    **settings: Any,
) -> Comparison:
    """Measures models on the same text, tasks and prompts, and compares every two of them unit by unit.

    Everything that can be known to be wrong, of all models and files, is said before anything is computed.

    Args:
        models: what `mergelab.load_model` takes, one after the other; or evaluations of the same material.
        text: texts that none was trained on: strings, and `Path`s of files.
        tasks: multiple choice: a file as `read_tasks` reads it, or tasks or their records.
        prompts: questions that are answered, or the `Path` of a file of them.
        adapters: LoRA adapters, each measured on the first model as one model more.
        dtype: dtype of the computation; the stored one if None.
        streamed: how activations wait, where the weights stay in their files; None to load them.
        progress: function called with the name of each model before it is measured.
        note: function called with each sentence that the user of a recipe or an adapter should know.
        settings: `field`, `most`, and the fields of `Material`, as of `evaluate_model`.

    Raises:
        EvaluationError: what cannot be measured, every reason at once; or evaluations of different units.
    """
    known = [one for one in models if isinstance(one, Evaluation)]
    if len(known) == len(models) and models:
        return Comparison(tuple(known))
    if known:
        raise EvaluationError("evaluations and models were mixed; evaluate the models first, or name all")
    if not models:
        raise EvaluationError("no model was named; name at least one")
    material, faults = gather(text, tasks, prompts, **settings)
    named: list[tuple[str, Any, Any]] = [(model_name(one), one, None) for one in models]
    named += [(model_name(models[0], adapter), models[0], adapter) for adapter in adapters]
    subjects = subjects_of(named, material, faults, dtype=dtype, streamed=streamed)
    if faults:
        raise EvaluationError(faults)
    for subject in subjects:
        for sentence in subject.notes:
            note(f"{subject.name}: {sentence}")
    found = []
    for subject in subjects:
        progress(subject.name)
        found.append(measure(subject, material))
    return Comparison(tuple(found))


def paired(one: Evaluation, other: Evaluation) -> dict[str, Difference]:
    """`other - one` in every figure that both have, over the same resamples.

    Raises:
        EvaluationError: they were measured on different numbers of units.
    """
    found: dict[str, Difference] = {}
    first, second = one.columns(), other.columns()
    for kind in first.keys() & second.keys():
        names = list(first[kind])
        pairs = [(first[kind][name], second[kind][name]) for name in names]
        columns = [column for pair in pairs for ratio in pair for column in ratio]
        if len({len(column) for column in columns}) > 1:
            raise EvaluationError(
                f"{one.name} and {other.name} were measured on different {kind}, so nothing pairs them; "
                "measure both on the same"
            )
        sums = resampled_sums(np.stack(columns, axis=1)).T
        prefix = "" if kind == "text" else f"{kind}."
        for i, name in enumerate(names):
            a, b, c, d = sums[4 * i : 4 * i + 4]
            found[prefix + name] = difference((a, b), (c, d), len(columns[0]))
    return {name: found[name] for name in _COLUMNS if name in found}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flat.items():
        kind, dot, last = name.rpartition(".")
        (found.setdefault(kind, {}) if dot else found)[last] = value
    return found


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    inner = {
        f"{kind}.{name}": value for kind in ("tasks", "answers") for name, value in data.get(kind, {}).items()
    }
    return {**data, **inner}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The names of models as a reader sees them: of each path the last parts that no other ends in."""
    parts = {name: PurePath(name).parts or (name,) for name in names}

    def tail(name: str, count: int) -> str:
        return name if count >= len(parts[name]) else "/".join(parts[name][-count:])

    found = {}
    for name in parts:
        others = [other for other in parts if other != name]
        count = 1
        while count < len(parts[name]) and any(tail(name, count) == tail(other, count) for other in others):
            count += 1
        found[name] = tail(name, count)
    return found


def _with_p(found: Difference) -> str:
    p = "" if found.p is None else f" p={found.p:.3g}"
    return f"{shown(found)}{p}"
