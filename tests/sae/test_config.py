"""What a configuration leaves away is the recipe's default."""

from __future__ import annotations

from mergelab.sae.config import TrainSection
from mergelab.sae.recipe import Recipe


def test_a_bare_configuration_is_the_bare_recipe() -> None:
    assert TrainSection(batch_size=8, tokens=80).build() == Recipe(steps=10, batch_size=8)
