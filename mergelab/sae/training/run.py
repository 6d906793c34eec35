"""A training run from a configuration to a finished dictionary, resumable at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from mergelab.data.activations import ActivationStream, Batch, Prefetch, Trace
from mergelab.errors import OutputError, SAEError
from mergelab.processes import together
from mergelab.sae.config import TrainConfig, load_config
from mergelab.sae.dictionary import Dictionary, DictionaryConfig
from mergelab.sae.finish import finished_dictionary, transcodes
from mergelab.sae.formats import save_dictionary
from mergelab.sae.initialize import SAMPLE_ROWS, initialize
from mergelab.sae.placement import batch_part, dictionary_shardings, place_batch
from mergelab.sae.provenance import host_metadata
from mergelab.sae.recipe import Recipe
from mergelab.sae.state import TrainState
from mergelab.sae.step import Metrics, Step, make_step
from mergelab.sae.training.checkpoints import Checkpoints
from mergelab.sae.training.data import open_data
from mergelab.sae.training.loggers import Logger, open_loggers
from mergelab.sae.training.metrics import MetricsFile
from mergelab.sae.variants import Variant
from mergelab.sharding import make_mesh

__all__ = ["Progress", "Result", "train"]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all, and the metrics of a logged step."""

_SUMMARY = ("nmse", "l0", "dead_fraction", "tokens")

_DIVERGED = 10.0
"""A normalised error this large is worse than any useful start: the training has diverged."""


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        path: the folder of the finished dictionary, `OUT/final`.
        dictionary: what is in it, its arrays on the mesh of the training.
        steps: steps done in all.
        metrics: of the last logged step.
        trace: how long the steps waited for data in this process.
    """

    path: Path
    dictionary: Dictionary
    steps: int
    metrics: dict[str, float]
    trace: Trace


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Trains a sparse autoencoder and writes it to `OUT/final`.

    `OUT` also gets `config.yaml`, `metrics.jsonl` and `checkpoints/`. In a distributed run every process
    makes this call on a shared file system; each reads the rows its devices need.

    Args:
        config: a YAML file or what it would hold (`mergelab.sae.config`).
        out: a new folder, or with `resume` that of an earlier run.
        resume: goes on from the last checkpoint; without one the run begins anew. On the same devices the
            result is bit for bit that of a run that was never stopped.
        overrides: `section.key=value`, as for `--set`.
        progress: is told of every logged step.

    Raises:
        SAEError: the configuration is wrong or another than that of the run to resume, or the training
            diverged; then the last good checkpoint is still there.
        OutputError: `out` holds a run already, or cannot be written.
        CheckpointError: activation files are missing or malformed.
    """
    settings = load_config(config, overrides)
    out = Path(out)
    recipe = settings.train.build()
    source, target = open_data(settings.data, recipe.tokens)
    variant = settings.sae.build(source.d_in, None if target is None else target.d_in)
    mesh = None if settings.mesh is None else make_mesh(settings.mesh)
    _check_batch(recipe, mesh)
    part, parts = batch_part(mesh)
    stream = ActivationStream(
        source,
        recipe.batch_size,
        seed=settings.train.seed,
        target=target,
        buffer_rows=settings.data.buffer_rows,
        process=part,
        processes=parts,
    )
    distributed = jax.process_count() > 1
    with together("opening the run's folder", distributed=distributed):
        if jax.process_index() == 0:
            _claim(out, settings, resume)
    # A dictionary remembers whose features it holds, so that it is never judged on another model. The process
    # that writes this asks alone: a model's digest takes reading all of it.
    host = host_metadata(settings.data) if jax.process_index() == 0 else {}
    known = {**host, **settings.metadata}
    # Sites that contradict the data are an error now, not after the training.
    DictionaryConfig("relu", sites=variant.sites, transcoder=transcodes(variant, known), metadata=known)
    state = _start(variant, recipe, settings, stream, mesh)
    step = make_step(variant, recipe, mesh)
    with Checkpoints(out / "checkpoints", settings.checkpoint.keep) as checkpoints:
        done = checkpoints.latest() if resume else None
        if done is not None:
            state, place = checkpoints.restore(done, state)
            stream.restore(place)
        run = _Run(settings, recipe, step, checkpoints, out, progress)
        state, trace = run.steps(state, done or 0, stream, mesh)
    summary = {name: run.last[name] for name in _SUMMARY if name in run.last}
    told = settings.model_dump(mode="json", include={"sae", "data", "train"}, exclude_defaults=True)
    metadata = {**known, "variant": variant.name, "training": summary, "settings": told}
    dictionary = _finish(variant, recipe, state, metadata, mesh)
    save_dictionary(dictionary, out / "final")
    return Result(out / "final", dictionary, recipe.steps, run.last, trace)


def _claim(out: Path, settings: TrainConfig, resume: bool) -> None:
    """Checks that the folder may be used, and says in it what for."""
    written = out / "config.yaml"
    if (out / "final").exists():
        raise OutputError(f"{out / 'final'}: a finished run is there; choose another folder")
    if written.is_file():
        if not resume:
            raise OutputError(f"{out}: an unfinished run is there; pass --resume, or choose another folder")
        before, now = yaml.safe_load(written.read_text()), settings.model_dump(mode="json")
        changed = _first_difference(before, now)
        if changed is not None:
            raise SAEError(f"{written}: the run began with {changed}; resume it as it was, or begin another.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty and holds no run; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    partial = out / ".config.yaml.partial"
    partial.write_text(text)
    partial.rename(written)


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*before, *(key for key in now if key not in before)):
            place = f"{path}.{key}" if path else str(key)
            # Where a run may go on differently: its devices, and what is kept on the way.
            if place not in ("mesh", "checkpoint", "log_to"):
                found = _first_difference(before.get(key), now.get(key), place)
                if found is not None:
                    return found
        return None
    return None if before == now else f"{path}: {before}, not {now}"


def _check_batch(recipe: Recipe, mesh: Mesh | None) -> None:
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    if recipe.batch_size % parts:
        raise SAEError(
            f"train.batch_size is {recipe.batch_size}, which {parts} devices cannot share; change one."
        )


def _start(
    variant: Variant, recipe: Recipe, settings: TrainConfig, stream: ActivationStream, mesh: Mesh | None
) -> TrainState:
    """The state before the first step, from a sample drawn like a batch; the same in every process."""
    rows = min(stream.source.rows, SAMPLE_ROWS)
    sample = next(
        ActivationStream(
            stream.source,
            rows,
            seed=settings.train.seed + 2**31,  # not the order of the training itself
            target=stream.target,
            buffer_rows=settings.data.buffer_rows,
        )
    )
    key = jax.random.key(settings.train.seed)
    target = None if variant.d_out is None else sample.target
    return initialize(variant, recipe, key, sample.input, target, mesh=mesh)


class _Run:
    """The loop: steps, lines of metrics one logged step late, checkpoints, and the guard."""

    def __init__(
        self,
        settings: TrainConfig,
        recipe: Recipe,
        step: Step,
        checkpoints: Checkpoints,
        out: Path,
        progress: Progress | None,
    ) -> None:
        self.recipe, self.step, self.checkpoints = recipe, step, checkpoints
        self.every, self.log_every = settings.checkpoint.every, settings.checkpoint.log_every
        self.settings, self.out, self.progress = settings, out, progress
        self.last: dict[str, float] = {}
        self._loggers: list[Logger] = []
        self._began = (0.0, 0)

    def steps(
        self, state: TrainState, done: int, stream: ActivationStream, mesh: Mesh | None
    ) -> tuple[TrainState, Trace]:
        def prepare(batch: Batch) -> tuple[Any, Any]:
            def put(rows: np.ndarray) -> Any:
                return jnp.asarray(rows) if mesh is None else place_batch(rows, mesh)

            x = put(batch.input)
            return x, x if batch.target is batch.input else put(batch.target)

        if jax.process_index() == 0:
            config = self.settings.model_dump(mode="json")
            self._loggers = [
                *open_loggers(self.settings.log_to, self.out, config, done),
                MetricsFile(self.out / "metrics.jsonl", done),
            ]
        waiting: tuple[int, Metrics] | None = None
        self._began = (time.perf_counter(), done)
        try:
            with Prefetch(stream, prepare) as batches:
                for number in range(done + 1, self.recipe.steps + 1):
                    x, y = next(batches)
                    state, metrics = self.step(state, x, y)
                    end = number == self.recipe.steps
                    save = number % self.every == 0 and not end
                    if number % self.log_every == 0 or save or end:
                        # The step before is read while this one runs; the device never waits for the log.
                        if waiting is not None:
                            self._log(*waiting)
                        waiting = (number, metrics)
                    if waiting is not None and (save or end):
                        self._log(*waiting)
                        waiting = None
                    if save:
                        self.checkpoints.save(number, state, batches.state())
                return state, batches.trace
        finally:
            for logger in self._loggers:
                logger.close()

    def _log(self, number: int, metrics: Metrics) -> None:
        line = {name: float(np.asarray(value)) for name, value in metrics.items()}
        if not np.isfinite(list(line.values())).all() or line["nmse"] > _DIVERGED:
            good = self.checkpoints.latest()
            where = "no checkpoint was written yet" if good is None else f"the last good checkpoint is {good}"
            raise SAEError(
                f"the training diverged at step {number} (loss {line['loss']:.4g}, nmse {line['nmse']:.4g}); "
                f"{where}: begin again with a lower train.lr, or with train.clip."
            )
        began, first = self._began
        seconds = max(time.perf_counter() - began, 1e-9)
        rate = (number - first) * self.recipe.batch_size / seconds
        self.last = {
            "step": number,
            "tokens": number * self.recipe.batch_size,
            **line,
            "tokens_per_second": rate,
        }
        for logger in self._loggers:
            logger.write(self.last)
        if self.progress is not None:
            self.progress(number, self.recipe.steps, self.last)


def _finish(
    variant: Variant,
    recipe: Recipe,
    state: TrainState,
    metadata: Mapping[str, Any],
    mesh: Mesh | None,
) -> Dictionary:
    """The dictionary, which stays on the mesh as the training's parameters lie there."""
    finish = partial(finished_dictionary, variant, recipe, metadata=metadata)
    needed = replace(state, mean={}, square={})
    shardings = None if mesh is None else dictionary_shardings(jax.eval_shape(finish, needed), mesh)
    return jax.jit(finish, out_shardings=shardings)(needed)
