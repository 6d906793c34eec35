"""The start of every training: its variant, its stream of batches, and the state before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from mergelab.activations import ActivationStream, Batch
from mergelab.activations.lane_rows import LaneRows, LaneStream, TextShare
from mergelab.activations.stream import lanes_of
from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainConfig, TrainingRecipe
from mergelab.sae.training.data import TrainingRows
from mergelab.sae.training.initialize import SAMPLE_ROWS, initialize, state_shapes
from mergelab.sae.training.memory import check_memory
from mergelab.sae.training.overview import Overview, draw_sample
from mergelab.sae.training.start_sample import StartSample
from mergelab.sae.training.state import TrainState, batch_fault, batch_part, place_batch
from mergelab.sae.variants import Variant

__all__ = ["Start", "check_parts", "start_training", "text_share"]


@dataclass(frozen=True)
class Start:
    """A training before its first step.

    Attributes:
        settings: configuration of the run.
        recipe: its part on steps and rates.
        variant: what is trained.
        stream: batches of this process, from the first row of the first epoch.
        mesh: devices along `data` and `latents`; one device if None.
    """

    settings: TrainConfig
    recipe: TrainingRecipe
    variant: Variant
    stream: ActivationStream | LaneStream
    mesh: Mesh | None

    def begin(self) -> tuple[TrainState, Overview]:
        """The state before the first step, from a sample of its first rows, and what they look like.

        The same in every process.
        """
        sample = self.draw()
        return self.state_from(sample.batch), sample.overview

    def draw(self) -> StartSample:
        """The sample from which the state before the first step is made, the same in every process.

        Of a stream at its first row; the batches take over what is read for it.
        """
        return StartSample(*draw_sample(self.stream, SAMPLE_ROWS, tokens=self.recipe.tokens))

    def state_from(self, sample: Batch) -> TrainState:
        """The state before the first step that a sample gives."""
        target = None if self.variant.d_out is None else sample.target
        key = jax.random.key(self.settings.train.seed)
        return initialize(self.variant, self.recipe, key, sample.input, target, mesh=self.mesh)

    def shapes(self) -> TrainState:
        """Shapes and places of a state, as a checkpoint is restored to; reads nothing."""
        return state_shapes(self.variant, self.recipe, self.mesh)

    def place(self, batch: Batch) -> tuple[Array, Array]:
        """Inputs and targets of a batch on the devices; one array where they are the same rows."""
        put = jnp.asarray
        if self.mesh is not None:
            put = partial(place_batch, mesh=self.mesh, batch_size=self.recipe.batch_size)
        x = put(batch.input)
        return x, x if batch.target is batch.input else put(batch.target)


def start_training(settings: TrainConfig, data: TrainingRows, mesh: Mesh | None) -> Start:
    """A training on rows, checked against the devices and their memory.

    Raises:
        SAEError: the devices cannot share a batch, or the training does not fit into their memory.
    """
    source, target, kept = data
    recipe = settings.train.build()
    variant = settings.sae.build(source.d_in, None if target is None else target.d_in)
    check_parts(recipe.batch_size, mesh)
    buffer_rows = settings.data.buffer_rows
    check_memory(variant, recipe, mesh, min(buffer_rows, source.rows))
    part, seed = batch_part(mesh, recipe.batch_size), settings.train.seed
    if isinstance(source, LaneRows):
        assert target is None or isinstance(target, LaneRows)
        stream: ActivationStream | LaneStream = LaneStream(
            source, recipe.batch_size, seed=seed, target=target, buffer_rows=buffer_rows, part=part
        )
    else:
        stream = ActivationStream(
            source,
            recipe.batch_size,
            seed=seed,
            target=target,
            buffer_rows=buffer_rows,
            part=part,
            readers=jax.process_count(),
            kept=kept,
        )
    return Start(settings, recipe, variant, stream, mesh)


def check_parts(batch_size: int, mesh: Mesh | None) -> None:
    """Refuses a batch that the devices along the axis `data` cannot share.

    Raises:
        SAEError: they cannot.
    """
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    if batch_size % parts:
        raise SAEError(batch_fault(batch_size, parts))


def text_share(settings: TrainConfig, mesh: Mesh | None, lanes: int | None) -> TextShare | None:
    """What this process reads of a text that processes share; None where each has all of it.

    Args:
        settings: configuration of the run.
        mesh: the mesh of the training.
        lanes: the lanes of a run that has begun, 0 for none; None for a new run.

    Raises:
        SAEError: the devices cannot share a batch.
    """
    if settings.data.kind != "model" or lanes == 0 or (lanes is None and jax.process_count() == 1):
        return None
    size = settings.train.batch_size
    check_parts(size, mesh)
    lanes = lanes or lanes_of(size, jax.process_count())
    touched = np.unique(batch_part(mesh, size) // (size // lanes))
    return TextShare(lanes=lanes, chosen=tuple(touched.tolist()))
