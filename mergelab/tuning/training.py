"""The loop of a fine-tuning: steps, judgments on held-out text, checkpoints, and the record of all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab.activations.batches import filled_batches
from mergelab.errors import MeshError, TuningError
from mergelab.processes.termination import Terminated
from mergelab.sharding import named_sharding
from mergelab.tuning.contexts import Rows, batch_of
from mergelab.tuning.lora import Factors
from mergelab.tuning.memory import TuningMemory
from mergelab.tuning.objective import Sums, TokenLoss
from mergelab.tuning.optimizers import Optimizer
from mergelab.tuning.settings import TuningSettings
from mergelab.tuning.steps import Figures, StepState, compile_step

__all__ = ["Hooks", "Progress", "Record", "Tuning", "check_batch", "mesh_of", "on_mesh"]

Progress = Callable[[int, int, Mapping[str, float]], object]
"""Called with steps done, steps in all, and the figures of the last step."""


@dataclass
class Record:
    """What happened, as plain numbers; nats per target.

    Attributes:
        steps: one entry for each step: `step`, `loss`, `cross_entropy`, `kl`, `gradient_norm`,
            `learning_rate` and `targets`.
        held_out: one entry for each judgment: `step` and `loss`, the mean cross-entropy of held-out targets.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)

    @property
    def before(self) -> float | None:
        """Held-out loss before the first step; None where nothing is held out."""
        return self.held_out[0]["loss"] if self.held_out else None

    @property
    def after(self) -> float | None:
        """Held-out loss after the last step; None where nothing is held out."""
        return self.held_out[-1]["loss"] if self.held_out else None


@dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Attributes:
        progress: called after each step whose figures are known.
        tell: told, line by line, what is about to happen and what memory it takes.
        due: whether a checkpoint is due after a step, and whether the run ends with it.
        save: keeps a state, with the number of its step and the record.
    """

    progress: Progress = lambda done, total, figures: None
    tell: Callable[[str], object] = lambda line: None
    due: Callable[[int], tuple[bool, bool]] = lambda step: (False, False)
    save: Callable[[int, StepState, Record], object] = lambda step, state, record: None


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are spread over; None for one device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """A tree whose leaves that lie on one device are on all of a mesh, whole."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Any:
        return (
            leaf
            if isinstance(getattr(leaf, "sharding", None), NamedSharding)
            else jax.device_put(leaf, whole)
        )

    return jax.tree.map(put, tree)


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning that is ready to run.

    Attributes:
        loss: what is minimized.
        optimizer: how.
        settings: what was asked for.
        learned: contexts that are trained on.
        judged: contexts that are held out, or None.
        fixed: parameters that are not trained: `params` beside factors, `teacher`.
        mesh: devices, or None for one.
    """

    loss: TokenLoss
    optimizer: Optimizer
    settings: TuningSettings
    learned: Rows
    judged: Rows | None
    fixed: Mapping[str, Any]
    mesh: Mesh | None = None

    @property
    def factors(self) -> Factors | None:
        """The factors that are trained; None where the parameters are."""
        return self.loss.factors

    def run(self, state: StepState, done: int, record: Record, hooks: Hooks) -> StepState:
        """The state after the last step.

        Args:
            state: state after `done` steps, which is used up.
            done: number of steps that are done.
            record: what happened in them, which is added to.
            hooks: what is called.

        Raises:
            TuningError: a loss is not finite.
            Terminated: SIGTERM came, and the state was kept.
        """
        total, every = self.optimizer.steps, self._every()
        step = compile_step(
            state, self.fixed, self._batch(done % total), loss=self.loss, optimizer=self.optimizer
        )
        hooks.tell(TuningMemory.of(step, state, self.fixed).sentence())
        if not done:
            self._judge(state, 0, record, hooks)
        rate, waiting = self.optimizer.rate(), None
        for number in range(done + 1, total + 1):
            state, figures = step(state, self.fixed, self._batch(number - 1))
            if jax.default_backend() == "cpu":
                jax.block_until_ready(figures)  # a step that waits for another would take its memory already
            if waiting is not None:  # the step before is read while this one runs
                self._note(*waiting, record, hooks)
            waiting = number, figures, float(np.asarray(rate(number - 1)))
            save, stop = hooks.due(number)
            end = number == total
            if end or number % every == 0 or save or stop:
                self._note(*waiting, record, hooks)
                waiting = None
            if end or number % every == 0:
                self._judge(state, number, record, hooks)
            if (save or stop) and not end:
                hooks.save(number, state, record)
            if stop and not end:
                raise Terminated
        return state

    def _every(self) -> int:
        return self.settings.evaluate_every or max(1, -(-self.optimizer.steps // 5))

    def _batch(self, step: int) -> tuple[Any, Any]:
        return self._put(batch_of(self.learned, step, self.settings), (None, "batch", "length"))

    def _put(self, batch: tuple[np.ndarray, ...], axes: tuple[str | None, ...]) -> Any:
        if self.mesh is None:
            return tuple(jnp.asarray(part) for part in batch)
        return tuple(jax.device_put(part, named_sharding(self.mesh, part.shape, axes)) for part in batch)

    def _note(self, number: int, figures: Figures, rate: float, record: Record, hooks: Hooks) -> None:
        known = {name: float(np.asarray(value)) for name, value in figures._asdict().items()}
        if not all(map(math.isfinite, known.values())):
            raise TuningError(
                f"the training diverged at step {number} (loss {known['loss']:g}, gradient norm "
                f"{known['gradient_norm']:g}); begin again with a lower learning rate, or in float32."
            )
        line = {"step": number, **known, "learning_rate": rate}
        record.steps.append(line)
        hooks.progress(number, self.optimizer.steps, line)

    def _judge(self, state: StepState, number: int, record: Record, hooks: Hooks) -> None:
        if self.judged is not None:
            found = self.judge(state.trained)
            record.held_out.append({"step": number, "loss": found})
            hooks.tell(f"step {number:,}: held-out loss {found:.4f}")

    def judge(self, trained: Any) -> float:
        """Mean cross-entropy of the held-out targets, in nats.

        Raises:
            TuningError: nothing is held out, or no target of it counts.
        """
        if self.judged is None:
            raise TuningError("nothing is held out; give a text to judge on (held_out).")
        loss = replace(self.loss, teacher=None, kl=0.0)
        fixed = {name: tree for name, tree in self.fixed.items() if name != "teacher"}
        nats, targets = 0.0, 0.0
        tokens, counted = self.judged.take(slice(None))
        for (rows, here), _ in filled_batches(self.settings.batch, tokens, counted):
            found = _judged(trained, fixed, self._put((rows, here), ("batch", "length")), loss=loss)
            nats, targets = nats + float(found[1]), targets + float(found[3])
        if not targets:
            raise TuningError(
                "no token of the held-out text counts: its conversations have no assistant turn."
            )
        return nats / targets


@partial(jax.jit, static_argnames="loss")
def _judged(trained: Any, fixed: Any, batch: tuple[Array, Array], *, loss: TokenLoss) -> Sums:
    return loss(trained, fixed, batch)


def check_batch(mesh: Mesh | None, batch: int) -> None:
    """Checks that the devices of a mesh share a batch evenly.

    Raises:
        MeshError: they do not.
    """
    if mesh is None:
        return
    shares = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    if batch % shares:
        raise MeshError(
            f"a batch of {batch} contexts cannot be shared by data * fsdp = {shares} devices; make it a "
            f"multiple of {shares}."
        )
