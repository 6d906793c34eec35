"""Checkpoints of a training: state and place in the data, written while the training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mergelab.sae.state import TrainState

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder of checkpoints, of which the last few are kept; a context manager that finishes writing.

    A checkpoint appears under its name when it is complete, so a run killed at any moment leaves only whole
    ones.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, place: Mapping[str, Any]) -> None:
        """Copies the state and writes it in the background."""
        if jax.default_backend() == "cpu":
            # Arrays of a CPU are written from where they lie, and the next step uses that memory up.
            state = jax.tree.map(jnp.copy, state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_tree(state)), place=ocp.args.JsonSave(dict(place))
            ),
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out like another on its devices, and the place in the data."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_tree(like)
        )
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), place=ocp.args.JsonRestore()),
        )
        leaves = jax.tree.leaves(found["state"])
        return jax.tree.unflatten(jax.tree.structure(like), leaves), dict(found["place"])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """A state as a flat dictionary, in the order of its leaves."""
    leaves = jax.tree.leaves(state)
    return {f"{index:03d}": leaf for index, leaf in enumerate(leaves)}
