"""The training step: one function for one device, a mesh of data and latents, many processes, or a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.sae import layer_norm
from mergelab.sae.training.aux_k import auxiliary_gradients
from mergelab.sae.training.recipe import TrainingRecipe
from mergelab.sae.training.state import TrainState, mesh_axes, state_specs
from mergelab.sae.training.update import update
from mergelab.sae.variants.variant import Context, Variant

__all__ = ["Metrics", "Step", "make_step", "train_step"]

Metrics = dict[str, Array]
"""float32 scalars: `loss`, `nmse`, `auxiliary`, `l0`, `dead_fraction`, `learning_rate`, `grad_norm`."""

Step = Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]

_LONGEST_QUIET = 2**30


def train_step(
    variant: Variant, recipe: TrainingRecipe, shards: Shards, state: TrainState, x: Array, y: Array
) -> tuple[TrainState, Metrics]:
    """One step, as one device of the mesh computes it: a pure function.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training's.
        shards: the mesh axes.
        state: this device's part of the latents.
        x: `[tokens, d_in]`, this device's part of the batch, raw activations.
        y: `[tokens, d_out]`, the targets; the same array for an autoencoder.
    """
    tokens = x.shape[0] * shards.num_data_shards()
    same = x is y
    x = x.astype(jnp.float32)
    x = state.read(layer_norm(x)[0] if recipe.normalize == "layer_norm" else x)
    y = x if same else state.target(y.astype(jnp.float32))
    n_local = state.quiet.shape[0]
    alive = None
    if "n_latents" in state.trial:
        alive = shards.latent_offset(n_local) + jnp.arange(n_local) < state.trial["n_latents"]
    context = Context(
        tokens=tokens,
        mse_scale=state.mse_scale,
        progress=state.step.astype(jnp.float32) / recipe.steps,
        statistics=state.statistics,
        shards=shards,
        compute_dtype=recipe.compute_dtype,
        k=state.trial.get("k"),
        alive=alive,
    )
    (loss, outcome), grads = jax.value_and_grad(variant.loss, has_aux=True)(state.params, x, y, context)

    fired = shards.any_data(outcome.codes.fired())
    quiet = jnp.where(fired, 0, jnp.minimum(state.quiet + tokens, _LONGEST_QUIET))
    dead, lifted = quiet >= recipe.dead_after, quiet >= recipe.lift_after
    if alive is not None:
        dead, lifted = dead & alive, lifted & alive
    auxiliary = jnp.zeros(())
    if variant.uses_aux_k:
        auxiliary, grads = auxiliary_gradients(
            variant,
            state.params,
            grads,
            dead,
            x,
            outcome.error,
            k=recipe.auxiliary_k(variant.width_out),
            coefficient=recipe.aux_coefficient,
            tokens=tokens,
            shards=shards,
            compute_dtype=recipe.compute_dtype,
        )
    grads = shards.sum_data(grads)
    raises = variant.uses_aux_k and recipe.lift > 0
    state, happened = update(variant, recipe, state, grads, shards, lifted if raises else None)
    total = variant.n_latents if alive is None else state.trial["n_latents"].astype(jnp.float32)
    metrics = {
        "loss": shards.sum_data(loss) + recipe.aux_coefficient * shards.sum_data(auxiliary),
        "nmse": shards.sum_data(outcome.nmse),
        "auxiliary": shards.sum_data(auxiliary),
        "l0": shards.sum_all(outcome.codes.count()) / tokens,
        "dead_fraction": shards.sum_latents(dead.sum(dtype=jnp.float32)) / total,
        **happened,
    }
    return replace(state, quiet=quiet, statistics=dict(outcome.statistics)), metrics


def make_step(
    variant: Variant, recipe: TrainingRecipe, mesh: Mesh | None = None, *, trials: bool = False
) -> Step:
    """The compiled step: `state, metrics = step(state, x, y)`; the state that is passed in is used up.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training's.
        mesh: axes `data` and `latents`, either of which may be missing; None is one device.
        trials: states have a leading axis, one entry per SAE of a sweep; all see the same batch.

    Returns:
        A function of the state, the inputs `[batch_size, d_in]` and the targets `[batch_size, d_out]` (the
        same array for an autoencoder).
    """
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    data, latents = mesh_axes(mesh) if mesh is not None else (None, None)
    shards = Shards(latents=latents, data=data, trials="trials" if trials else None, platform=platform)
    autoencoder = variant.d_out is None

    def part(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        return train_step(variant, recipe, shards, state, x, x if autoencoder else y)

    if trials:
        part = jax.vmap(part, in_axes=(0, None, None), axis_name="trials")
    if mesh is None:
        return jax.jit(part, donate_argnums=0)

    def on_mesh(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        specs = state_specs(state, latents)
        rows = PartitionSpec(data, None)
        run = jax.shard_map(
            part, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(specs, PartitionSpec()), check_vma=False
        )
        return run(state, x, y)

    return jax.jit(on_mesh, donate_argnums=0)
