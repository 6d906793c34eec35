"""The tiers: files that are thorough are there, and their tests are chosen by their marker alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiers import THOROUGH


def test_every_thorough_file_is_there(repository: Path) -> None:
    assert sorted(name for name in THOROUGH if not (repository / name).is_file()) == []


def test_a_file_that_is_not_listed_is_light(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("thorough") is None
    assert "tests/test_tiers.py" not in THOROUGH
