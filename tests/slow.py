"""Which cases of a test run always, and which in the slow run only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(light: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All `cases` as parameters; those not in `light`, which go the same ways once more, are marked slow."""
    light, cases = list(light), list(cases)
    missing = [case for case in light if case not in cases]
    assert not missing, f"not among the cases: {missing}"
    return [case if case in light else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
