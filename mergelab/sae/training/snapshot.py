"""The SAE in a checkpoint of a run, finished or not: as it would be if the training ended there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from mergelab.errors import CheckpointError
from mergelab.sae.sae import SAE
from mergelab.sae.training.checkpoints import Checkpoints
from mergelab.sae.training.config import load_config
from mergelab.sae.training.data import sae_metadata
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.folder import known_of_run
from mergelab.sae.training.initialize import fresh_state, sample_shapes
from mergelab.sae.training.tracking import read_metrics

__all__ = ["Snapshot", "snapshot_sae"]


@dataclass(frozen=True)
class Snapshot:
    """An SAE of a checkpoint.

    Attributes:
        sae: the SAE, ready for raw activations; the average of the parameters, where the run keeps one.
        step: step of the checkpoint.
        steps: steps of the whole training.
    """

    sae: SAE
    step: int
    steps: int


def snapshot_sae(run: str | Path, step: int | None = None) -> Snapshot:
    """The SAE of a run's checkpoint. The run may go on meanwhile.

    Args:
        run: folder of the run.
        step: step of the checkpoint; the newest whole one if None.

    Raises:
        CheckpointError: the folder holds no run, or no such checkpoint that is whole.
        SAEError: the run's configuration is damaged.
    """
    folder = Path(run)
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} is no run of `mergelab sae train`: it has no config.yaml")
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{folder} keeps no checkpoint of step {step} (it has: {there})")
    chosen = checkpoints.find().step if step is None else step
    if chosen is None:
        raise CheckpointError(f"{folder}: the run has no whole checkpoint; wait for one, or go on with it")
    if (fault := checkpoints.fault(chosen)) is not None:
        raise CheckpointError(f"{folder / 'checkpoints' / str(chosen)} {fault}; take another step")
    settings = load_config(folder / "config.yaml")
    known = known_of_run(folder)
    if known is None:
        raise CheckpointError(f"{folder / 'inputs.json'} does not say what the run reads; go on with the run")
    recipe = checkpoints.recipe(chosen, settings.train)
    variant = settings.sae.build(known.d_in, known.d_out)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(partial(fresh_state, variant, recipe), key, sample_shapes(variant))
    here = SingleDeviceSharding(jax.devices()[0])
    like: Any = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    state, _ = checkpoints.restore(chosen, like, recipe.batch_size)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] == chosen]
    summary = {**(lines[-1] if lines else {}), "step": chosen, "steps": recipe.steps}
    metadata = sae_metadata(settings, variant.name, known.metadata, summary)
    sae = jax.jit(partial(finished_sae, variant, recipe, metadata=metadata))(state)
    return Snapshot(sae, chosen, settings.train.build().steps)
