"""Controls: SAEs that know nothing of the model, and what they score."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mergelab.activations import ActivationStream
from mergelab.activations.model_activations import ModelActivations
from mergelab.errors import SAEError, did_you_mean
from mergelab.sae.sae import SAE
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import SAMPLE_ROWS, initialize
from mergelab.sae.training.state import TrainState
from mergelab.sae.training.step import Metrics, Step, make_step
from mergelab.sae.variants import TopK
from mergelab.sae.variants.variant import Variant

__all__ = ["CONTROLS", "control_sae", "freeze_decoder", "random_model", "random_state"]


def random_state(
    variant: Variant,
    key: Array,
    sample: np.ndarray | Array,
    target_sample: np.ndarray | Array | None = None,
) -> TrainState:
    """An SAE before any training: decoder rows uniform on the sphere, the encoder their transpose.

    Args:
        variant: the SAE's hyper-parameters.
        key: a `jax.random` key.
        sample: `[rows, d_in]` activations; the center is their geometric median, as in a training.
        target_sample: `[rows, d_out]`, for a transcoder.
    """
    return initialize(variant, TrainingRecipe(steps=1, batch_size=1, ema=0), key, sample, target_sample)


def freeze_decoder(step: Step, initial: TrainState, ema: float) -> Step:
    """A step that trains everything but the directions of the decoder, and their moving average.

    Args:
        step: what `mergelab.sae.training.step.make_step` gave.
        initial: the state the training starts from; its decoder is copied here, before a step uses it up.
        ema: the decay of the recipe's moving average.
    """
    decoder = jnp.copy(initial.params["decoder"])

    def frozen(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, x, y)
        average = state.average
        if average:
            # The weights of an average that is not yet normalized sum to 1 - ema^steps.
            weight = 1 - ema ** state.step.astype(jnp.float32)
            average = {**average, "decoder": weight * decoder}
        # A copy: the next step donates its state, and this decoder must outlive it.
        params = {**state.params, "decoder": jnp.copy(decoder)}
        return replace(state, params=params, average=average), metrics

    return frozen


CONTROLS = ("random", "frozen decoder", "random model")
"""An untrained SAE; one whose encoder alone was trained; one fully trained on a random model."""


def random_model(source: ModelActivations, seed: int = 0) -> ModelActivations:
    """The same text through the same architecture with fresh parameters."""
    return replace(source, params=source.model.init(seed))


def control_sae(
    kind: str,
    source: ModelActivations,
    *,
    n_latents: int,
    k: int,
    steps: int = 500,
    batch_size: int = 1024,
    seed: int = 0,
    target_site: str | None = None,
) -> SAE:
    """Makes a top-k SAE of the source's first site, or a transcoder from it to another of its sites.

    Args:
        kind: one of `CONTROLS`.
        source: the activations it is fitted to; for `random model`, those of that model (`random_model`).
        n_latents: number of latents of the SAE that is judged.
        k: active latents per token, about as many as its L0.
        steps: number of training steps.
        batch_size: maximum rows of a batch; a text with fewer rows has batches of all of them.
        seed: seed of parameters and order.
        target_site: site of the source that the control of a transcoder writes.

    Raises:
        SAEError: there is no such kind, or k is out of range.
    """
    if kind not in CONTROLS:
        raise SAEError(f"there is no control {kind!r}{did_you_mean(kind, CONTROLS)}; known: {CONTROLS}.")
    rows = source.at(source.sites[0])
    target = None if target_site in (None, source.sites[0]) else source.at(target_site)
    variant = TopK(d_in=rows.d_in, n_latents=n_latents, k=k, d_out=None if target is None else target.d_in)
    kept = source.kept_rows(source.sites[0], target_site if target is not None else None)
    count = int(source.by_place.sum())
    recipe = TrainingRecipe(steps=steps, batch_size=max(min(batch_size, count), 1))
    # Not the directions that a training with this seed begins from: a control must not be its relative.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    # Another order than the training's own.
    drawn = next(ActivationStream(rows, min(count, SAMPLE_ROWS), seed=seed + 1, target=target, kept=kept))
    sample, target_sample = drawn.input, None if target is None else drawn.target
    metadata = {"control": kind, "site": source.sites[0]}
    metadata |= {} if target is None else {"target_site": target_site}
    if kind == "random":
        state = random_state(variant, key, sample, target_sample)
        return finished_sae(variant, recipe, state, use_average=False, metadata=metadata)
    state = initialize(variant, recipe, key, sample, target_sample)
    step = make_step(variant, recipe)
    if kind == "frozen decoder":
        step = freeze_decoder(step, state, recipe.ema_decay)
    stream = ActivationStream(rows, recipe.batch_size, seed=seed, target=target, kept=kept)
    for _ in range(recipe.steps):
        batch = next(stream)
        x = jnp.asarray(batch.input)
        state, _ = step(state, x, x if target is None else jnp.asarray(batch.target))
    return finished_sae(variant, recipe, state, metadata=metadata)
