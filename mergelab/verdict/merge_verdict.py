"""The honest sentence about a merge: whether it beats its best parent on held-out text, and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import EvaluationError
from mergelab.merging.plan.input_models import is_planned
from mergelab.merging.unwritten_merge import open_merge
from mergelab.operators import OPERATORS
from mergelab.verdict.bootstrap import LEVEL, Difference
from mergelab.verdict.comparison import Comparison, paired, short_names
from mergelab.verdict.evaluation import Evaluation, Material, OpenedModel, gather, measure, subjects_of

if TYPE_CHECKING:
    from mergelab.merging.plan.planner import Plan
__all__ = ["MergeTrial", "MergeVerdict", "prepare_verdict", "verdict_of"]

_FIGURE = "bits_per_byte"
_BEGIN, _END = "<!-- verdict -->", "<!-- end of verdict -->"
_SECTION = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)


@dataclass(frozen=True)
class MergeVerdict:
    """What held-out text says of merges.

    Attributes:
        sentence: the verdict in words.
        beats: whether the best merge beats the best parent beyond chance.
        merge: name of the best merge.
        parent: name of the best parent.
        difference: bits per byte of that merge less those of that parent; negative is better.
        comparison: all models.
    """

    sentence: str
    beats: bool
    merge: str
    parent: str
    difference: Difference
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "sentence": self.sentence,
            "beats": self.beats,
            "merge": self.merge,
            "best_parent": self.parent,
            "difference": self.difference.to_dict(),
            **self.comparison.to_dict(),
        }

    def write_to_card(self, folder: Path) -> None:
        """Adds the verdict to a model's card, in the place of an earlier one.

        Raises:
            OutputError: the card cannot be written.
            CheckpointError: it cannot be read.
        """
        card = folder / "README.md"
        before = read_text(card) if card.is_file() else f"# {folder.name}\n"
        table = ["```text", self.comparison.table(), "```"]
        lines = [_BEGIN, "## Verdict", "", f"{self.sentence}.", "", *table, _END]
        text = _SECTION.sub("", before).rstrip() + "\n\n" + "\n".join(lines) + "\n"
        publish_file(card, text.encode())


def verdict_of(
    parents: Sequence[Evaluation], merges: Sequence[Evaluation], others: Sequence[Evaluation] = ()
) -> MergeVerdict:
    """The verdict on merges, measured on the same text as their parents.

    Args:
        parents: the models that were merged.
        merges: what was made of them.
        others: more models of the comparison, such as the base.

    Raises:
        EvaluationError: there is no parent or no merge, or one was not measured on text.
    """
    if not parents or not merges or any(one.text is None for one in (*parents, *merges)):
        raise EvaluationError("a verdict needs parents and merges that were measured on text; measure them")
    parent, merge = min(parents, key=_bits), min(merges, key=_bits)
    found = paired(parent, merge)[_FIGURE]
    beats = found.value < 0 and _is_beyond_chance(found)
    short = short_names([one.name for one in (*others, *parents, *merges)])
    sentence = _sentence(short[parent.name], short[merge.name], found, beats=beats, several=len(merges) > 1)
    for base in (one for one in others if one.text is not None):
        against = paired(base, merge)[_FIGURE]
        if not (against.value < 0 and _is_beyond_chance(against)):
            neither = "it does not" if beats else "nor does it"
            sentence += f"; {neither} beat the base {short[base.name]} ({_p(against)})"
    comparison = Comparison((*others, *parents, *merges))
    return MergeVerdict(sentence, beats, merge.name, parent.name, found, comparison)


def _bits(one: Evaluation) -> float:
    assert one.text is not None
    return float(one.text.bits.sum() / one.text.bytes.sum())


def _sentence(parent: str, merge: str, found: Difference, *, beats: bool, several: bool) -> str:
    best = f"the best merge {merge}" if several else "the merge"
    p = _p(found)
    if beats:
        return f"{best} beats its best parent {parent} by {_by(found)} ({p})"
    within = ", which chance explains" if found.value < 0 else ""
    return f"no merge beats parent {parent} on held-out text ({p}): {best} is {_by(found)}{within}"


def _by(found: Difference) -> str:
    """`0.0123 bits per byte [0.0080, 0.0167]` where it is better beyond chance; else in which way, too."""
    ends = found.interval
    if found.value < 0:
        shown = "" if ends is None else f" [{-ends[1]:.4f}, {-ends[0]:.4f}]"
        return f"{-found.value:.4f} bits per byte{' better' if not _is_beyond_chance(found) else ''}{shown}"
    shown = "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
    if found.value == 0:
        return f"equal in bits per byte{shown}"
    return f"{found.value:.4f} bits per byte worse{shown}"


def _is_beyond_chance(found: Difference) -> bool:
    return found.p is not None and found.p < 1 - LEVEL


def _p(found: Difference) -> str:
    return "too little text for a p" if found.p is None else f"p = {found.p:.2g}"


@dataclass(frozen=True)
class MergeTrial:
    """Parents and base of a merge, and the text that it will be measured on; nothing is computed yet.

    Attributes:
        material: the text.
        parents: the models that are merged.
        others: the base, where there is one.
    """

    material: Material
    parents: tuple[OpenedModel, ...]
    others: tuple[OpenedModel, ...]

    def of_merge(
        self, out: Path, name: str, progress: Callable[[str], object] = lambda name: None
    ) -> MergeVerdict:
        """The verdict on a merge that was written.

        Args:
            out: its folder.
            name: what it is called.
            progress: function called with the name of each model before it is measured.

        Raises:
            EvaluationError: it cannot be measured.
        """
        faults: list[str] = []
        merges = subjects_of([(name, out, None)], self.material, faults)
        if faults:
            raise EvaluationError(faults)
        found: dict[str, list[Evaluation]] = {}
        for kind, subjects in (("others", self.others), ("parents", self.parents), ("merges", merges)):
            for subject in subjects:
                progress(subject.name)
                found.setdefault(kind, []).append(measure(subject, self.material))
        return verdict_of(found["parents"], found["merges"], found.get("others", []))


def prepare_verdict(plan: Plan, text: Path, **settings: Any) -> MergeTrial:
    """The parents of a merge that is to be judged on a text, checked before a weight is read.

    Parents are the models of the plan and of the recipes it builds on. The base is not one of them where
    there are several besides it, and the operator does not take it as one more input.

    Args:
        plan: the merge.
        text: file of held-out text.
        settings: further fields of `Material`, such as `context`.

    Raises:
        EvaluationError: the text, a model or the merge cannot be evaluated, every reason at once.
    """
    material, faults = gather(text, None, None, **settings)
    plans = (*plan.stages.values(), plan)
    bases = {one.recipe.base_model for one in plans if OPERATORS[one.recipe.merge_method].base != "as_input"}
    models = {m.name: m.checkpoint for one in plans for m in one.models if not is_planned(m.checkpoint)}
    parents = [name for name in models if name not in bases]
    if len(parents) < 2:
        parents = list(models)
    opened = subjects_of([(name, c, None) for name, c in models.items()], material, faults)
    if not faults:
        subjects_of([("the merge", open_merge(plan), None)], material, faults)
    if faults:
        raise EvaluationError(faults)
    return MergeTrial(
        material,
        tuple(one for one in opened if one.name in parents),
        tuple(one for one in opened if one.name not in parents),
    )
