"""Checkpoints of an SAE's training: what they count, and the recipe they were made by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.state_checkpoints import PLACE, StateCheckpoints
from mergelab.sae.training.config import TrainingRecipe, TrainSection
from mergelab.sae.training.state import TrainState

__all__ = ["TOKENS", "Checkpoints"]

_COUNTS = "counts"
"""Key beside the place in the data: the unit in which latents that do not fire are counted; once tokens."""

TOKENS = "tokens"
"""Key beside the place in the data: the tokens of the whole training, as it was planned then."""


class Checkpoints(StateCheckpoints):
    """A folder of checkpoints of `TrainState`s."""

    def recipe(self, step: int, train: TrainSection) -> TrainingRecipe:
        """The recipe by which the checkpoint of a step was made; a run may have been made longer since.

        Raises:
            CheckpointError: the checkpoint's place cannot be read.
        """
        tokens = read_json_object(self.folder / str(step) / PLACE).get(TOKENS)
        if isinstance(tokens, int) and tokens != train.tokens:
            train = train.model_copy(update={"tokens": tokens})
        return train.build()

    def save(self, step: int, state: TrainState, place: Mapping[str, Any]) -> None:
        """Copies the state and writes it, in the background where this process writes alone.

        Raises:
            OutputError: this one, or the one before it, cannot be written.
            MeshError: that happened in another process.
        """
        super().save(step, state, {**place, _COUNTS: "steps"})

    def restore(self, step: int, like: TrainState, tokens_per_step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out like another on its devices, and the place in the data.

        Args:
            step: step of the checkpoint.
            like: a state of the same shapes.
            tokens_per_step: batch size, for checkpoints that count tokens since a latent fired, not steps.

        Raises:
            CheckpointError: it cannot be read.
        """
        state, place = self.read(step, like)
        if place.pop(_COUNTS, "tokens") == "tokens":
            steps = -(-state.steps_since_fired // tokens_per_step)
            state = replace(state, steps_since_fired=jax.device_put(steps, like.steps_since_fired.sharding))
        return state, place
