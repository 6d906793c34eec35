"""The table of measured operators says what the recorded runs say."""

from __future__ import annotations

from benchmarks.measured_operators import PAGE, render
from mergelab.operators import OPERATORS


def test_the_page_is_that_of_the_recorded_runs():
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m benchmarks.measured_operators`"


def test_every_operator_has_a_row():
    text = render()
    assert all(f"(operators.md#{name})" in text for name in OPERATORS)
