"""Tasks as files say them, every fault at once, and the answers that texts give."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mergelab.errors import EvaluationError
from mergelab.reasoning import Task, check_tasks, extract_answer, read_tasks, reference_answer
from mergelab.reasoning.pattern_search import find_last


def test_a_file_of_tasks_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(
        '{"prompt": "2 + 2 =", "answer": 4}\n\n'
        '{"prompt": "Red?", "answer": "blood", "choices": ["grass", "blood"], "source": "me"}\n'
        '{"prompt": "Red?", "answer": 0, "choices": ["grass", "blood"]}\n'
    )
    first, second, third = read_tasks(file)
    assert (first.prompt, first.answer, first.choices) == ("2 + 2 =", "4", ())
    assert (second.answer, third.answer) == ("B", "A")
    assert second.question == "Red?\nA. grass\nB. blood" and first.question == "2 + 2 ="


def test_every_fault_of_a_file_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    lines = [
        '{"prompt": "a", "anwser": "1"}',
        '{"answer": "1"}',
        "[1]",
        '{"prompt": "a"',
        '{"prompt": " ", "answer": true}',
        '{"prompt": "a", "answer": "C", "choices": ["x", "y"]}',
        '{"prompt": "a", "answer": "x", "choices": ["x"]}',
        '{"prompt": "a", "answer": "1"}',
    ]
    file.write_text("\n".join(lines))
    with pytest.raises(EvaluationError) as caught:
        read_tasks(file)
    said = str(caught.value)
    for number, words in enumerate(
        ["no 'answer' (did you mean 'anwser'?)", "no 'prompt'", "not a JSON object", "not valid JSON",
         "the prompt is ' '", "none of 2 choices", "2 to 26 texts"], 1,
    ):  # fmt: skip
        assert any(f"line {number}" in fault and words in fault for fault in caught.value.faults), (
            words,
            said,
        )
    assert "expected a text or a number" in said and "line 8" not in said
    with pytest.raises(EvaluationError, match="task 2 has no 'answer'"):
        check_tasks([Task("a", "1"), {"prompt": "b"}])
    file.write_text("\n")
    with pytest.raises(EvaluationError, match="holds no tasks"):
        check_tasks(file)


@pytest.mark.parametrize(
    ("how", "task", "text", "answer"),
    [
        ("auto", Task("?", "1,234.50"), "It is 7, no: 1234.5.", "1234.5"),
        ("auto", Task("?", "#### 72"), "so 72", "72"),
        ("auto", Task("?", "Paris"), " Paris\n", "Paris"),
        ("number", Task("?", "72"), "none", None),
        ("boxed", Task("?", "1200"), r"\boxed{ 1{,}200 }", "1200"),
        ("boxed", Task("?", r"\frac{1}{2}"), r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("exact", Task("?", "x"), "  ", None),
        (r"regex:= (\w+)$", Task("?", "b"), "x = a\ny = b", "b"),
        (r"regex:\d+", Task("?", "b"), "none", None),
        (str.upper, Task("?", "b"), "b", "B"),
    ],
    ids=["number", "gsm8k", "exact", "no number", "boxed", "fraction", "empty", "regex", "no match", "call"],
)  # fmt: skip
def test_an_answer_is_found(how: object, task: Task, text: str, answer: str | None) -> None:
    assert extract_answer(text, task, how) == answer  # type: ignore[arg-type]
    if answer is not None:
        assert reference_answer(task, how) == answer  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A good question. The answer is (B).", "B"),
        ("answer: c", "C"),
        ("**B**", "B"),
        (" C", "C"),
        ("B. blood", "B"),
        ("It must be blood.", "B"),
        ("grass or blood", None),
        ("I am Z", None),
    ],
)
def test_a_letter_is_found(text: str, letter: str | None) -> None:
    assert extract_answer(text, Task("Red?", "B", ("grass", "blood", "the sky"))) == letter


@pytest.mark.parametrize(
    ("how", "words"), [("nubmer", "did you mean 'number'"), ("regex:(", "not a regular"), ("regex:", "empty")]
)
def test_an_extractor_that_is_none_is_refused(how: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        extract_answer("1", Task("?", "1"), how)


def test_a_pattern_that_never_ends_is_given_up_and_the_next_one_is_found() -> None:
    hostile, text = r"(a+)+$", "a" * 60 + "b"
    begun = time.monotonic()
    with pytest.raises(EvaluationError, match=r"61 characters of a trace after 0.5 seconds.*repetitions"):
        find_last(hostile, text, seconds=0.5)
    assert time.monotonic() - begun < 20
    assert find_last(r"x(\d)?|(y)", "x1 x") is None  # a group that did not take part
    assert find_last(r"^\w", "é\n\ud800\nü\n") == "ü"
