"""What a training takes, estimated before anything of it is made, against what there is."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from mergelab.errors import SAEError
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.variants import Variant

__all__ = ["check_memory", "machine_memory", "readable_bytes", "state_bytes"]


def state_bytes(variant: Variant, recipe: TrainingRecipe) -> int:
    """Bytes of parameters, of Adam's two means, and of the moving average if one is kept; all float32."""
    widths = variant.d_in + variant.width_out
    parameters = variant.n_latents * (widths + 1) + variant.width_out
    parameters += variant.d_in * variant.width_out if variant.skip else 0
    return 4 * parameters * (4 if recipe.ema_decay > 0 else 3)


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container this process runs in, if that has less."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        found = 2**63
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return found


def check_memory(variant: Variant, recipe: TrainingRecipe, mesh: Mesh | None, rows: int) -> None:
    """Refuses a training that cannot fit; one that passes may still need more than there is.

    Args:
        variant: variant that is trained.
        recipe: training recipe.
        mesh: the devices; JAX's default device if None.
        rows: rows of activations that are held at a time, besides the batch.

    Raises:
        SAEError: the state alone, or the rows, take more than the devices or this machine have.
    """
    devices = list(jax.devices()[:1] if mesh is None else mesh.devices.flat)
    state = state_bytes(variant, recipe)
    device, share = devices[0], state / len(devices)
    if device.platform == "cpu":
        # All devices of one process share its machine's memory.
        share *= sum(other.process_index == device.process_index for other in devices)
        limit, whose = machine_memory(), "this machine has"
    else:
        limit, whose = (device.memory_stats() or {}).get("bytes_limit", 2**63), "a device has"
    if share > limit:
        raise SAEError(
            f"n_latents is {variant.n_latents:,}: the state of the training takes {readable_bytes(state)}, "
            f"and {whose} {readable_bytes(limit)}; take fewer latents, or a mesh of more devices."
        )
    batch = 4 * (recipe.batch_size + rows) * (variant.d_in + variant.width_out)
    if batch > machine_memory():
        raise SAEError(
            f"batch_size is {recipe.batch_size:,} and {rows:,} rows are held to be shuffled: that takes "
            f"{readable_bytes(batch)}, and this machine has {readable_bytes(machine_memory())}; lower them."
        )


def readable_bytes(count: float) -> str:
    """`1234567` as `1.23 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
