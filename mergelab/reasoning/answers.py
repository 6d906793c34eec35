r"""Answers found in texts: a number, what is boxed, a letter among choices, a pattern, or the text itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from functools import lru_cache

from mergelab.decoding.votes import boxed_answer, last_number
from mergelab.errors import EvaluationError, did_you_mean, quoted
from mergelab.reasoning.pattern_search import find_last
from mergelab.reasoning.tasks import Task

__all__ = ["EXTRACTORS", "Extract", "check_extractor", "extract_answer", "reference_answer"]

Extract = Callable[[str], Hashable | None]
"""What a text answers, in a form in which equal answers are equal; None where it does not answer."""

EXTRACTORS = ("auto", "number", "boxed", "choice", "exact", "regex:PATTERN")
"""Names of the extractors."""

_TAIL = 10_000  # characters at the end of a text in which an answer is looked for
_SAID = re.compile(
    r"(?:answer|option|choice)\b[^A-Za-z0-9]{0,12}(?:is|:)?[\s*(\[]{0,6}([A-Z])\b", re.IGNORECASE
)


def check_extractor(how: str | Extract) -> None:
    """Refuses what names no extractor.

    Raises:
        EvaluationError: an unknown name, or a pattern that is none.
    """
    if not isinstance(how, str):
        return
    if how.startswith("regex:"):
        _check_pattern(how.removeprefix("regex:"))
    elif how not in EXTRACTORS[:-1]:
        known = ", ".join(EXTRACTORS)
        raise EvaluationError(
            f"{quoted(how)} names no way to find an answer{did_you_mean(how, EXTRACTORS[:-1])}; the ways "
            f"are {known}"
        )


def extract_answer(text: str, task: Task, how: str | Extract = "auto") -> Hashable | None:
    r"""What a text answers to a task; None where it does not answer.

    >>> from mergelab.reasoning import Task
    >>> task = Task("Which is red?", "B", ("grass", "blood"))
    >>> extract_answer("So the answer is (B).", task), extract_answer("2 + 2 is 4.0", Task("?", "4"))
    ('B', '4')

    Args:
        text: what a model wrote, without the prompt.
        task: what it was asked.
        how: `number`, the last one; `boxed`, the last `\boxed{...}`; `choice`, a letter; `exact`, the whole
            text; `regex:PATTERN`, the first group of its last match, or the match; a function of the text; or
            `auto`: `choice` for a task with choices, `number` where the answer has one, else `exact`.

    Raises:
        EvaluationError: as `check_extractor`; or a pattern's search does not end (`find_last`).
    """
    if not isinstance(how, str):
        return how(text)
    check_extractor(how)
    how, tail = _chosen(how, task), text[-_TAIL:]
    if how == "number":
        return last_number(tail)
    if how == "boxed":
        found = boxed_answer(tail)
        return None if found is None else _plain(found)
    if how == "choice":
        return _choice(tail, task)
    if how == "exact":
        return text.strip() or None
    found = find_last(how.removeprefix("regex:"), tail)
    return None if found is None else found.strip()


def reference_answer(task: Task, how: str | Extract = "auto") -> Hashable:
    """The right answer in the form in which `extract_answer` gives it.

    Args:
        task: what is asked.
        how: same as in `extract_answer`.
    """
    if not isinstance(how, str):
        found = how(task.answer)
        return task.answer if found is None else found
    how = _chosen(how, task)
    if how == "number":
        return last_number(task.answer) or task.answer.strip()
    if how == "boxed":
        return _plain(boxed_answer(task.answer) or task.answer)
    return task.answer.strip()


def _chosen(how: str, task: Task) -> str:
    if how != "auto":
        return how
    return "choice" if task.choices else "exact" if last_number(task.answer) is None else "number"


def _plain(boxed: str) -> str:
    """What is boxed without spaces and signs that change nothing; a number as `last_number` writes it."""
    text = re.sub(r"\\[,!;]|\{,\}|[\s$]", "", boxed)
    return (last_number(text) or text) if re.fullmatch(r"-?[\d,]+(\.\d+)?", text) else text


def _choice(text: str, task: Task) -> str | None:
    """The letter of the choice that a text names: said to be the answer, alone, or by its words."""
    letters = [chr(ord("A") + number) for number in range(len(task.choices) or 26)]
    said = [letter.upper() for letter in _SAID.findall(text) if letter.upper() in letters]
    if said:
        return said[-1]
    alone = [letter for letter in re.findall(r"(?<![\w'])([A-Z])(?![\w'])", text) if letter in letters]
    # "A" and "I" are words, too: they count where they stand like a choice.
    marked = [m for m in re.findall(r"(?:^|[(\[*\s])([A-Z])(?:[)\].:*]|\s*$)", text) if m in letters]
    if marked or alone:
        return (marked or alone)[-1]
    named = [n for n, choice in enumerate(task.choices) if choice.casefold() in text.casefold()]
    return letters[named[0]] if len(named) == 1 else None


@lru_cache
def _check_pattern(text: str) -> None:
    try:
        if not text or len(text) > 1000:
            raise ValueError("it is empty" if not text else "it is longer than 1,000 characters")
        re.compile(text, re.MULTILINE)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise EvaluationError(
            f"the pattern {quoted(text)} is not a regular expression: {error}; correct it"
        ) from None
