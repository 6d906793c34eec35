"""Python examples of every page but the front page, which a lighter test runs, end in what the pages show."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from tests.test_docs import FLAGS, PAGES, REPOSITORY

OTHERS = [page for page in PAGES if page != REPOSITORY / "README.md" and ">>> " in page.read_text("utf-8")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow) if p.name == "interp.md" else p for p in OTHERS
    ],  # many programs
    ids=lambda p: str(p.relative_to(REPOSITORY)),
)
def test_the_python_examples_in_the_pages_are_true(page: Path) -> None:
    examples = doctest.DocTestParser().get_examples(page.read_text(encoding="utf-8"))
    failures, count = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert count == len(examples) > 0
    assert failures == 0


def test_there_are_pages_with_examples() -> None:
    assert len(OTHERS) > 10
