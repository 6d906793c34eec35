"""The planted model and its directions, made once."""

from __future__ import annotations

import pytest

from mergelab.abliteration.direction_selection import DirectionSelection, Filters, select_direction
from mergelab.abliteration.directions import Directions, find_directions
from tests.abliteration.planted import POSITIONS, REFUSE, Planted, plant, prompt_set


@pytest.fixture(scope="session")
def planted() -> Planted:
    """A tiny model that refuses one class of prompts."""
    return plant()


@pytest.fixture(scope="session")
def directions(planted: Planted) -> Directions:
    """Its candidates."""
    sets = prompt_set(128, 1, True), prompt_set(128, 2, False)
    return find_directions(planted.model, planted.params, *sets, positions=POSITIONS, batch=64)


@pytest.fixture(scope="session")
def selection(planted: Planted, directions: Directions) -> DirectionSelection:
    """The one chosen on other prompts; four layers are too few to leave the last out."""
    sets = prompt_set(64, 3, True), prompt_set(64, 4, False)
    filters = Filters(max_depth=1.0)
    return select_direction(
        planted.model, planted.params, directions, *sets, [REFUSE], filters=filters, batch=64
    )
