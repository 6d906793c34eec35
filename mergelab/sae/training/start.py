"""The start of every training: its variant, its stream of batches, and the state before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from mergelab.activations import ActivationStream, Batch
from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainConfig, TrainingRecipe
from mergelab.sae.training.data import TrainingRows
from mergelab.sae.training.initialize import SAMPLE_ROWS, initialize
from mergelab.sae.training.memory import check_memory
from mergelab.sae.training.overview import Overview, draw_sample
from mergelab.sae.training.state import TrainState, batch_fault, batch_part, place_batch
from mergelab.sae.variants import Variant

__all__ = ["Start", "start_training"]


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
    stream: ActivationStream
    mesh: Mesh | None

    def begin(self) -> tuple[TrainState, Overview]:
        """The state before the first step, from a sample drawn like a batch, and what the sample looks like.

        The same in every process.
        """
        seed = self.settings.train.seed
        sample, overview = draw_sample(
            self.stream,
            SAMPLE_ROWS,
            seed + 2**31,  # not the order of the training itself
            buffer_rows=self.settings.data.buffer_rows,
            tokens=self.recipe.tokens,
        )
        target = None if self.variant.d_out is None else sample.target
        key = jax.random.key(seed)
        return initialize(self.variant, self.recipe, key, sample.input, target, mesh=self.mesh), overview

    def place(self, batch: Batch) -> tuple[Array, Array]:
        """Inputs and targets of a batch on the devices; one array where they are the same rows."""
        put = jnp.asarray if self.mesh is None else partial(place_batch, mesh=self.mesh)
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
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    if recipe.batch_size % parts:
        raise SAEError(batch_fault(recipe.batch_size, parts))
    check_memory(variant, recipe, mesh, min(settings.data.buffer_rows, source.rows))
    part, processes = batch_part(mesh)
    stream = ActivationStream(
        source,
        recipe.batch_size,
        seed=settings.train.seed,
        target=target,
        buffer_rows=settings.data.buffer_rows,
        process=part,
        processes=processes,
        kept=kept,
    )
    return Start(settings, recipe, variant, stream, mesh)
