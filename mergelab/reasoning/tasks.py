"""Tasks with known answers: what a model is asked, and what counts as right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, EvaluationError, did_you_mean, quoted
from mergelab.verdict.choice_tasks import choice_index

__all__ = ["Task", "check_tasks", "read_tasks"]

_FAULTS = 20
_EXAMPLE = '{"prompt": "17 * 23 =", "answer": "391"}'


@dataclass(frozen=True)
class Task:
    """Something to solve, with its answer.

    Attributes:
        prompt: text that the model is given.
        answer: what is right; of a task with choices the letter of the right one.
        choices: texts of which one is right; empty for a free answer.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The prompt, and under it the choices with their letters, a line each."""
        lines = [f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(self.choices)]
        return "\n".join([self.prompt, *lines])


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a file of JSON lines: `prompt`, `answer`, and for multiple choice `choices`.

    The answer is a text or a number; among choices also an index from 0 on or a letter.

    Raises:
        EvaluationError: the file cannot be read or holds no task, or lines are none; every reason at once.
    """
    faults: list[str] = []
    found: list[Task] = []
    for number, line in enumerate(read_text(path, error=EvaluationError).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = parse_json(line.encode("utf-8", "surrogatepass"), place)
            found.append(_task(record, place))
        except (CheckpointError, EvaluationError) as error:
            faults += error.faults
        if len(faults) > _FAULTS:
            break
    if not found and not faults:
        faults.append(f"{path} holds no tasks; write one a line: {_EXAMPLE}")
    if faults:
        raise EvaluationError(faults)
    return found


def check_tasks(tasks: Sequence[Task | Mapping[str, Any]] | str | Path) -> list[Task]:
    """Tasks, records of tasks, or a file of them, as tasks.

    Raises:
        EvaluationError: records are none, every reason at once; or there are no tasks.
    """
    if isinstance(tasks, str | Path):
        return read_tasks(tasks)
    faults: list[str] = []
    found: list[Task] = []
    for number, one in enumerate(tasks, 1):
        try:
            found.append(one if isinstance(one, Task) else _task(one, f"task {number}"))
        except EvaluationError as error:
            faults += error.faults
    if faults or not found:
        raise EvaluationError(faults or f"no tasks were given; give at least one, such as {_EXAMPLE}")
    return found


def _task(record: Any, place: str) -> Task:
    if not isinstance(record, Mapping):
        raise EvaluationError(f"{place} is not a JSON object; write {_EXAMPLE}")
    faults: list[str] = []
    for name in ("prompt", "answer"):
        if record.get(name) is None:
            others = [key for key in record if isinstance(key, str) and key not in ("prompt", "answer")]
            faults.append(f"{place} has no {name!r}{did_you_mean(name, others)}; give one")
    prompt, answer, choices = record.get("prompt"), record.get("answer"), record.get("choices")
    if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
        faults.append(f"{place}: the prompt is {quoted(prompt)}; expected a text")
    if choices is not None:
        texts = [one for one in choices if isinstance(one, str) and one.strip()] if _is_list(choices) else []
        if not _is_list(choices) or not 2 <= len(choices) <= 26 or len(texts) < len(choices):
            faults.append(f"{place}: the choices are {quoted(choices)}; expected 2 to 26 texts")
        elif answer is not None:
            index = choice_index(answer, texts)
            if index is None:
                faults.append(
                    f"{place}: the answer is {quoted(answer)}, none of {len(texts)} choices; give an index "
                    f"from 0 to {len(texts) - 1}, a letter, or the text of the choice"
                )
            elif not faults:
                return Task(str(prompt), chr(ord("A") + index), tuple(texts))
    elif answer is not None:
        number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if not number and not (isinstance(answer, str) and answer.strip()):
            faults.append(f"{place}: the answer is {quoted(answer)}; expected a text or a number")
    if faults:
        raise EvaluationError(faults)
    return Task(str(prompt), str(answer))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
