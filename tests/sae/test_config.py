"""Fields that a configuration omits take the recipe's defaults."""

from __future__ import annotations

import pytest

from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainingRecipe, TrainSection


def test_a_bare_configuration_is_the_bare_recipe() -> None:
    assert TrainSection(batch_size=8, tokens=80).build() == TrainingRecipe(steps=10, batch_size=8)


@pytest.mark.parametrize("name", ["b1", "b2", "ema"])
@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_running_mean_that_never_moves_is_refused(name: str, value: float) -> None:
    with pytest.raises(SAEError, match=f"^{name} is {value}; .* below 1"):
        TrainingRecipe(steps=10, batch_size=8, **{name: value})
