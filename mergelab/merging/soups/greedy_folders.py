"""Greedy soups of folders: streamed, and resumable from a journal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.output_target import check_target, disk_errors
from mergelab.checkpoints.publish import WorkFolder, publish_file
from mergelab.checkpoints.text_file import read_text
from mergelab.checkpoints.writer import identity_digest
from mergelab.errors import CheckpointError, OutputError
from mergelab.merging.plan.planner import make_plan
from mergelab.merging.soups.folders import StrPath, average_checkpoints, candidate_names, soup_recipe
from mergelab.merging.soups.greedy import Rule, describe, greedy_search
from mergelab.merging.soups.scores import Objective, Scores, SoupSelection, as_selection, call_evaluator
from mergelab.merging.soups.trace import SoupTrace

__all__ = ["FolderEvaluator", "SoupJournal", "greedy_soup_checkpoints", "trace_path"]


@dataclass
class SoupJournal:
    """Scores of soups by their members, on disk after every evaluation.

    The search itself is deterministic and cheap: run again over remembered scores it makes the same
    decisions, so evaluations are all that need be kept.

    Attributes:
        path: the file.
        subject: what the scores are of (evaluator, fingerprints of the candidates); a journal of another
            subject is refused.
        scores: score of each set of members, which are in the order they were added.
    """

    path: Path
    subject: Mapping[str, object]
    scores: dict[tuple[str, ...], Scores] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, subject: Mapping[str, object]) -> SoupJournal:
        """Returns the journal at `path`, empty if there is none.

        Raises:
            OutputError: it is unreadable, or of another subject.
        """
        if not path.exists():
            return cls(path, subject)
        try:
            data = read_json_object(path)
            scores = {tuple(entry["members"]): entry["scores"] for entry in data["scores"]}
            found = dict(data["subject"])
        except (CheckpointError, AttributeError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is not a readable journal of a greedy soup; start again with --overwrite."
            ) from error
        if odd := next((key for key in subject if found.get(key) != subject[key]), None):
            raise OutputError(
                f"{path} is of an interrupted soup with different {odd}; start again with --overwrite, or "
                "choose another output folder."
            )
        return cls(path, subject, scores)

    def record(self, members: tuple[str, ...], scores: Scores) -> None:
        """Adds one evaluation and writes the file anew."""
        self.scores[members] = scores
        entries = [{"members": list(m), "scores": dict(s)} for m, s in self.scores.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("w", encoding="utf-8") as stream:
            json.dump({"subject": self.subject, "scores": entries}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self.path)


FolderEvaluator = Callable[[Path], float | Mapping[str, float]]
"""Scores the model in a folder: a number, or numbers by metric name."""


def trace_path(out: StrPath) -> Path:
    """Returns where the trace of the soup in `out` lies: beside it, as `OUT.trace.json`."""
    return Path(out).with_name(Path(out).name + ".trace.json")


def greedy_soup_checkpoints(
    checkpoints: Sequence[StrPath],
    out: StrPath,
    evaluate: FolderEvaluator,
    *,
    selection: str | Objective | SoupSelection = "score",
    rule: Rule = "paper",
    min_delta: float = 0.0,
    patience: int | None = None,
    max_size: int | None = None,
    test_evaluate: FolderEvaluator | None = None,
    evaluation: str = "",
    overwrite: bool = False,
    on_evaluation: Callable[[tuple[str, ...], Scores], None] | None = None,
    inputs: Iterable[Path] = (),
    **options: Any,
) -> SoupTrace:
    """Writes the greedy soup of checkpoints to `out`, and its trace beside it.

    Every trial is the mean of its members, read from the members' own files in one streamed pass, summed
    in float32 and rounded once to their dtype: rounding cannot compound, the folder evaluated is the
    folder that would be kept, and one trial folder is all the extra disk needed (two with
    `test_evaluate`). Interrupted, the same call goes on after the last finished evaluation.

    Args:
        checkpoints: model folders.
        out: the folder to write.
        evaluate: scores a folder on *validation* data.
        selection: a metric's name (larger is better), a `Objective`, or a rule over several metrics.
        rule: whether a tie is accepted ("paper") or not ("code").
        min_delta: least improvement in the first metric, >= 0.
        patience: stop after this many rejections in a row; None: try every candidate.
        max_size: stop when the soup has this many members; None: no bound.
        test_evaluate: scores a folder on *test* data; called after the search, on the soup, the best single
            checkpoint by validation and the uniform soup.
        evaluation: says what the scores are of, so that an interrupted run with another evaluation is not
            taken up.
        overwrite: replace `out`, and forget an interrupted run.
        on_evaluation: told of every validation score, remembered ones too.
        inputs: files that the evaluators read, which the output must not replace.
        options: further options of `mergelab.merge` for the trials and the soup.

    Returns:
        The trace, as stored in `trace_path(out)`.

    Raises:
        EvaluationError: as `greedy_soup`.
        OutputError: `out` exists or could cost an input, another run writes it, or an interrupted run was of
            other checkpoints or another evaluator.
        RecipeError: a checkpoint is given twice, or architectures differ.
    """
    paths = candidate_names(checkpoints)
    inputs = (*paths.values(), *inputs)
    check_target(Path(out), inputs)
    _check_trace(trace_path(out), inputs)
    plan = make_plan(soup_recipe(dict.fromkeys(paths.values(), 1.0)))  # faults are told before any evaluation
    chosen = as_selection(selection)
    metrics = [metric.name for metric in chosen.metrics]
    subject = {
        "evaluation": evaluation,
        "metrics": metrics,
        "checkpoints": {name: _fingerprint(path) for name, path in paths.items()},
    }
    settings = {
        "rule": rule,
        "min_delta": min_delta,
        "patience": patience,
        "max_size": max_size,
    }
    facts = {"subject": subject, "selection": str(chosen), "test": test_evaluate is not None, **settings}
    identity = identity_digest({"soup": json.dumps(facts, sort_keys=True), "plan": plan.identity})
    with WorkFolder(Path(out), inputs=inputs, overwrite=overwrite) as work:
        if work.finished(identity):
            return SoupTrace.from_json(read_text(trace_path(out)))
        work.prepare()
        if overwrite:
            work.clear_stages()
        journal = SoupJournal.open(work.stages / "journal.json", subject)

        def score(members: tuple[str, ...]) -> Scores:
            if members not in journal.scores:
                trial = work.stages / "trial"
                folder = paths[members[0]] if len(members) == 1 else _mix(paths, members, trial, options)
                found = call_evaluator(evaluate, folder, who=describe(members), metrics=metrics)
                journal.record(members, found)
            if on_evaluation is not None:
                on_evaluation(members, journal.scores[members])
            return journal.scores[members]

        trace = greedy_search(
            paths,
            score,
            selection=chosen,
            rule=rule,
            min_delta=min_delta,
            patience=patience,
            max_size=max_size,
        )
        shutil.rmtree(work.stages / "trial", ignore_errors=True)
        # Named as its model card shall say.
        soup = _mix(paths, trace.members, work.stages / "result" / work.out.name, options)
        if test_evaluate is not None:
            uniform = _mix(paths, tuple(paths), work.stages / "uniform", options)
            best = paths[trace.ranking[0].name]
            folders = {"soup": soup, "best_single": best, "uniform": uniform}
            tests = {name: _test(test_evaluate, f, name, metrics) for name, f in folders.items()}
            trace = trace.with_test(tests)
        text = json.dumps(trace.to_json(), indent=2) + "\n"
        publish_file(trace_path(out), text.encode(), inputs=inputs)
        with disk_errors(work.out):
            work.clear(recreate=False)
            soup.rename(work.path)
        work.publish(identity)
    return trace


def _check_trace(path: Path, inputs: Iterable[Path]) -> None:
    """Refuses a trace's place in which something else lies."""
    check_target(path, inputs, folder=False)
    if path.exists():
        try:
            SoupTrace.from_json(read_text(path, error=OutputError))
        except OutputError:
            raise OutputError(
                f"{path} is there already and is not the trace of a greedy soup; move it, or choose another "
                "output"
            ) from None


def _test(evaluate: FolderEvaluator, folder: Path, name: str, metrics: Sequence[str]) -> Scores:
    who = f"the {name} on test"
    return call_evaluator(evaluate, folder, who=who, metrics=metrics, required=False)


def _mix(paths: Mapping[str, Path], members: Sequence[str], folder: Path, options: Mapping[str, Any]) -> Path:
    """Writes the mean of the members to `folder`, in place of what is there."""
    average_checkpoints([paths[name] for name in members], folder, overwrite=True, **options)
    return folder


def _fingerprint(path: Path) -> list[object]:
    """Headers, config, sizes and times of a checkpoint's files; reads no weights."""
    checkpoint = open_checkpoint(path)
    times = [file.file.path.stat().st_mtime_ns for file in checkpoint.files]
    return [checkpoint.fingerprint(), times]
