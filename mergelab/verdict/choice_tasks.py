"""Multiple choice: the log-likelihood of every choice after its question, as it is and per byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.batches import bucket_size
from mergelab.activations.losses import scores_of_windows
from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, EvaluationError, did_you_mean, quoted
from mergelab.models.model import Model, Params
from mergelab.text.corpus_tokens import bos_of
from mergelab.text.tokenizer import Tokenizer

__all__ = ["ChoiceTask", "TaskScores", "check_tasks", "choice_index", "read_tasks", "score_tasks"]

_QUESTIONS = ("question", "prompt", "query", "ctx", "context")
_CHOICES = ("choices", "options", "endings")
_ANSWERS = ("answer", "answerKey", "label", "gold", "target")
_FAULTS = 20


@dataclass(frozen=True)
class ChoiceTask:
    """A question with choices, of which one is right.

    Attributes:
        question: text that each choice follows.
        choices: what may follow; a space joins it where neither side has one.
        answer: index of the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def joined(self, choice: str) -> str:
        """The choice as it follows the question, with the space that joins it."""
        apart = not self.question or self.question[-1].isspace() or choice[:1].isspace()
        return choice if apart else f" {choice}"


@dataclass(frozen=True)
class TaskScores:
    """A model's choices: float64 `[tasks]` each.

    Attributes:
        right: 1 where the most likely choice is the right one.
        right_per_byte: the same of log-likelihoods divided by the bytes of the choices, so that length does
            not decide.
        chance: 1 over the number of choices.
        log_likelihoods: nats of every choice, a list for each task.
    """

    right: np.ndarray
    right_per_byte: np.ndarray
    chance: np.ndarray
    log_likelihoods: tuple[tuple[float, ...], ...]


def read_tasks(path: str | Path) -> list[ChoiceTask]:
    """The tasks of a file of JSON lines: `{"question": ..., "choices": [...], "answer": 1}`.

    The question may be called `prompt`, `query`, `ctx` or `context`; the choices `options` or `endings`, or
    be `{"text": [...], "label": [...]}`; the answer, also `answerKey`, `label`, `gold` or `target`, is an
    index from 0 on, a letter, a label, or the text of a choice.

    Raises:
        EvaluationError: the file cannot be read or holds no task, or lines are none; every reason at once.
    """
    place = str(path)
    faults: list[str] = []
    found: list[ChoiceTask] = []
    for number, line in enumerate(read_text(path, error=EvaluationError).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_task(_record(line), f"{place}, line {number}"))
        except EvaluationError as error:
            faults += error.faults
        if len(faults) > _FAULTS:
            break
    if not found and not faults:
        faults.append(
            f'{place} holds no tasks; write one a line: {{"question": ..., "choices": [...], "answer": 0}}'
        )
    if faults:
        raise EvaluationError(faults)
    return found


def check_tasks(tasks: Sequence[ChoiceTask | Mapping[str, Any]]) -> list[ChoiceTask]:
    """Tasks, or the records of tasks, as tasks.

    Raises:
        EvaluationError: records are none, every reason at once; or there are no tasks.
    """
    faults: list[str] = []
    found: list[ChoiceTask] = []
    for number, one in enumerate(tasks, 1):
        try:
            found.append(one if isinstance(one, ChoiceTask) else _task(one, f"task {number}"))
        except EvaluationError as error:
            faults += error.faults
    if faults or not found:
        raise EvaluationError(faults or "no tasks were given; give at least one")
    return found


def _record(line: str) -> Any:
    try:
        return parse_json(line.encode("utf-8", "surrogatepass"), "the line")
    except CheckpointError:
        return None


def _task(record: Any, place: str) -> ChoiceTask:
    if not isinstance(record, Mapping):
        raise EvaluationError(f'{place} is not a JSON object; write {{"question", "choices", "answer"}}')
    question: Any = _field(record, _QUESTIONS, place)
    choices: Any = _field(record, _CHOICES, place)
    answer = _field(record, _ANSWERS, place)
    labels: Any = None
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(question, str) or not question.strip():
        raise EvaluationError(f"{place}: the question is {quoted(question)}; expected a text")
    texts = (
        [one for one in choices if isinstance(one, str) and one.strip()] if isinstance(choices, list) else []
    )
    if not isinstance(choices, list) or len(texts) < max(2, len(choices)):
        raise EvaluationError(f"{place}: the choices are {quoted(choices)}; expected two texts or more")
    index = choice_index(answer, texts, labels if isinstance(labels, list) else [])
    if index is None:
        raise EvaluationError(
            f"{place}: the answer is {quoted(answer)}, none of {len(texts)} choices; give an index from 0 "
            f"to {len(texts) - 1}, a letter, or the text of the choice"
        )
    return ChoiceTask(question, tuple(texts), index)


def _field(record: Mapping[str, Any], names: Sequence[str], place: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    others = [name for name in record if isinstance(name, str)]
    near = next((said for name in names if (said := did_you_mean(name, others))), "")
    raise EvaluationError(f"{place} has no {names[0]!r}{near}; give one")


def choice_index(answer: Any, choices: Sequence[str], labels: Sequence[Any] = ()) -> int | None:
    """The index from 0 on that an answer means: an index, a label, a letter, or a choice; None for none."""
    if isinstance(answer, bool):
        return None
    if answer in labels:
        return labels.index(answer) if labels.index(answer) < len(choices) else None
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if answer in choices:
        return choices.index(answer)
    text = answer.strip()
    if len(text) == 1 and text.isascii() and text.isalpha():
        index = ord(text.upper()) - ord("A")
    else:
        index = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else -1
    return index if 0 <= index < len(choices) else None


def score_tasks(
    model: Model, params: Params, tokenizer: Tokenizer, tasks: Sequence[ChoiceTask], *, batch: int = 8
) -> TaskScores:
    """A model's log-likelihoods of all choices, and which of them it would take.

    Question and choice are encoded as one text; the tokens that differ from those of the question alone are
    the choice's, and their log-likelihoods are summed. Of equal choices the first is taken.

    Args:
        model: a decoder.
        params: its parameters, on any mesh, or streamed.
        tokenizer: its tokenizer.
        tasks: questions with their choices.
        batch: choices in one forward pass.

    Raises:
        EvaluationError: a question with its choice is longer than the model's positions.
        TokenError: ids beyond the vocabulary.
    """
    rows = _rows(model, tokenizer, tasks)
    sums = np.zeros(len(rows))
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, (ids, _) in enumerate(rows):
        by_length[min(bucket_size(len(ids) - 1), model.config.max_length)].append(number)
    windows = []
    for length, some in by_length.items():
        tokens = np.zeros((len(some), length + 1), np.int32)
        counted = np.zeros((len(some), length), bool)
        for line, flags, number in zip(tokens, counted, some, strict=True):
            ids, first = rows[number]
            line[: len(ids)] = ids
            flags[first - 1 : len(ids) - 1] = True
        windows.append((tokens, counted))
    scores = scores_of_windows(model, params, windows, batch=batch)
    for some, (nats, _) in zip(by_length.values(), scores, strict=True):
        sums[some] = -nats.astype(np.float64).sum(axis=1)
    right, per_byte, found = [], [], []
    taken = iter(sums.tolist())
    for task in tasks:
        chosen = np.array([next(taken) for _ in task.choices])
        sizes = np.array([len(choice.encode("utf-8", "surrogatepass")) for choice in task.choices])
        right.append(float(np.argmax(chosen) == task.answer))
        per_byte.append(float(np.argmax(chosen / sizes) == task.answer))
        found.append(tuple(chosen.tolist()))
    chance = np.array([1 / len(task.choices) for task in tasks])
    return TaskScores(np.array(right), np.array(per_byte), chance, tuple(found))


def _rows(model: Model, tokenizer: Tokenizer, tasks: Sequence[ChoiceTask]) -> list[tuple[list[int], int]]:
    """Ids of every question with each of its choices, and where the choice begins in them."""
    begin = bos_of(tokenizer)
    before = [] if begin is None else [begin]
    found = []
    for number, task in enumerate(tasks, 1):
        alone = [*before, *tokenizer.encode(task.question, add_special_tokens=False)]
        for choice in task.choices:
            text = task.question + task.joined(choice)
            ids = [*before, *tokenizer.encode(text, add_special_tokens=False)]
            pairs = zip(alone, ids, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(ids)))
            # A choice has a token of its own, and something before it.
            first = max(1, min(common, len(ids) - 1))
            if len(ids) < 2 or len(ids) - 1 > model.config.max_length:
                raise EvaluationError(
                    f"task {number}: question and choice are {len(ids):,} tokens of {tokenizer.folder}, "
                    f"whose model reads 2 to {model.config.max_length:,}; omit the task"
                )
            found.append((ids, first))
    return found
