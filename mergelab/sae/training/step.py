"""The training step: one function for one device, a mesh of data and latents, many processes, or a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from mergelab.processes.agreement import span_processes
from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.normalizations import layer_norm
from mergelab.sae.training.aux_k import aux_k_gradients
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.state import TrainState, mesh_axes, state_specs, whole_batch
from mergelab.sae.training.update import update
from mergelab.sae.variants.variant import Context, Variant

__all__ = ["Metrics", "Step", "make_step", "train_step"]

Metrics = dict[str, Array]
"""float32 scalars: `loss`, `nmse`, `auxiliary`, `l0`, `dead_fraction`, `learning_rate`, `grad_norm`."""

Step = Callable[[TrainState, Array, Array], tuple[TrainState, Metrics]]


def train_step(
    variant: Variant, recipe: TrainingRecipe, shards: Shards, state: TrainState, x: Array, y: Array
) -> tuple[TrainState, Metrics]:
    """One step, as one device of the mesh computes it: a pure function.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training recipe.
        shards: the mesh axes.
        state: this device's part of the latents.
        x: `[tokens, d_in]`, this device's part of the batch, raw activations.
        y: `[tokens, d_out]`, the targets; not read for an autoencoder, whose target is its input.
    """
    tokens = x.shape[0] * shards.num_data_shards()
    x = x.astype(jnp.float32)
    x = state.read(layer_norm(x)[0] if recipe.normalize == "layer_norm" else x)
    y = x if variant.d_out is None else state.target(y.astype(jnp.float32))
    n_local = state.steps_since_fired.shape[0]
    alive = None
    if "n_latents" in state.sweep_member:
        alive = shards.latent_offset(n_local) + jnp.arange(n_local) < state.sweep_member["n_latents"]
    context = Context(
        tokens=tokens,
        mse_scale=state.mse_scale,
        progress=state.step.astype(jnp.float32) / recipe.steps,
        statistics=state.statistics,
        shards=shards,
        compute_dtype=recipe.compute_dtype,
        k=state.sweep_member.get("k"),
        alive=alive,
    )
    (loss, outcome), grads = jax.value_and_grad(variant.loss, has_aux=True)(state.params, x, y, context)

    fired = shards.any_data(outcome.codes.fired())
    since = jnp.where(fired, 0, state.steps_since_fired + 1)
    dead, boosted = (since >= -(-limit // tokens) for limit in (recipe.dead_after, recipe.boost_after))
    if alive is not None:
        dead, boosted = dead & alive, boosted & alive
    auxiliary = jnp.zeros(())
    if variant.uses_aux_k:
        auxiliary, grads = aux_k_gradients(
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
    boosts = variant.uses_aux_k and recipe.bias_boost > 0
    state, happened = update(variant, recipe, state, grads, shards, boosted if boosts else None)
    total = variant.n_latents if alive is None else state.sweep_member["n_latents"].astype(jnp.float32)
    metrics = {
        "loss": shards.sum_data(loss) + recipe.aux_coefficient * shards.sum_data(auxiliary),
        "nmse": shards.sum_data(outcome.nmse),
        "auxiliary": shards.sum_data(auxiliary),
        "l0": shards.sum_all(outcome.codes.count()) / tokens,
        "dead_fraction": shards.sum_latents(dead.sum(dtype=jnp.float32)) / total,
        **happened,
    }
    return replace(state, steps_since_fired=since, statistics=dict(outcome.statistics)), metrics


def make_step(
    variant: Variant, recipe: TrainingRecipe, mesh: Mesh | None = None, *, sweep: bool = False
) -> Step:
    """The compiled step: `state, metrics = step(state, x, y)`; the state that is passed in is used up.

    Args:
        variant: the SAE's hyper-parameters.
        recipe: the training recipe.
        mesh: axes `data` and `latents`, either of which may be missing; None is one device.
        sweep: states have a leading axis, one entry per SAE of a sweep; all see the same batch.

    Returns:
        A function of the state, the inputs `[batch_size, d_in]` and the targets `[batch_size, d_out]` (the
        same array for an autoencoder).
    """
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    data, latents = mesh_axes(mesh) if mesh is not None else (None, None)
    shards = Shards(latents=latents, data=data, sweep="sweep" if sweep else None, platform=platform)

    def part(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        return train_step(variant, recipe, shards, state, x, y)

    if sweep:
        part = jax.vmap(part, in_axes=(0, None, None), axis_name="sweep")
    if mesh is None:
        return jax.jit(part, donate_argnums=0)

    spans = span_processes(mesh.devices.flat)

    def on_mesh(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Metrics]:
        specs = state_specs(state, latents)
        if spans:
            x, y = (whole_batch(rows, mesh, recipe.batch_size) for rows in (x, y))
        rows = PartitionSpec(data, None)
        run = jax.shard_map(
            part, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(specs, PartitionSpec()), check_vma=False
        )
        return run(state, x, y)

    return jax.jit(on_mesh, donate_argnums=0)
