"""Names of models in tables are as short as they can be told apart by."""

from __future__ import annotations

import pytest

from mergelab.verdict.comparison import short_names


@pytest.mark.parametrize(
    "names, short",
    [
        (["base", "ties.yaml"], ["base", "ties.yaml"]),
        (["/m/a/base", "/m/a/code", "out/ties.yaml"], ["base", "code", "ties.yaml"]),
        (["/m/a/final", "/m/b/final"], ["a/final", "b/final"]),
        (["final", "/m/final"], ["final", "m/final"]),
        (["org/name", "other/name"], ["org/name", "other/name"]),
        (["base+/adapters/law"], ["law"]),
    ],
)
def test_short_names_are_the_last_parts_that_differ(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short
