"""Configuration to finished SAE: a run that can be interrupted and resumed."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mergelab.activations import Prefetch, PrefetchTrace
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.errors import CheckpointError, SAEError
from mergelab.processes.agreement import check_shared, together
from mergelab.processes.exchange import gathered_facts
from mergelab.processes.stopping import Termination
from mergelab.processes.termination import Terminated
from mergelab.sae.formats import load_sae, save_sae
from mergelab.sae.sae import SAE, SAEConfig, sae_shardings
from mergelab.sae.training.checkpoints import TOKENS, Checkpoints
from mergelab.sae.training.config import TrainConfig, TrainingRecipe, load_config
from mergelab.sae.training.data import host_metadata, open_data, sae_metadata, told_of_tokens
from mergelab.sae.training.divergence import DivergenceGuard
from mergelab.sae.training.finish import finished_sae, transcodes
from mergelab.sae.training.folder import KnownOfRun, RunFolder
from mergelab.sae.training.inputs import read_once
from mergelab.sae.training.model_loss import ModelLoss, hold_out
from mergelab.sae.training.overview import Overview
from mergelab.sae.training.start import Start, start_training, text_share
from mergelab.sae.training.start_sample import StartSample, kept_overview
from mergelab.sae.training.state import TrainState
from mergelab.sae.training.step import Metrics, Step, make_step
from mergelab.sae.training.tracking import Logger, MetricsFile, open_loggers
from mergelab.sae.training.warm_start import extended_state, started_from
from mergelab.sae.variants import Variant
from mergelab.sharding import DISPATCH, make_mesh

__all__ = ["Progress", "Result", "finish_training", "train"]

_logger = logging.getLogger(__name__)


Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with steps done, steps in all, and the metrics of a logged step."""


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        path: the folder of the finished SAE, `OUT/final`.
        sae: the SAE in it, its arrays on the mesh of the training.
        steps: number of steps done in all.
        metrics: metrics of the last logged step.
        trace: how long the steps waited for data in this process.
        resumed: the run had finished before; nothing was trained.
    """

    path: Path
    sae: SAE
    steps: int
    metrics: dict[str, float]
    trace: PrefetchTrace
    resumed: bool = False


@writes_anywhere()
def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overrides: str | Sequence[str] = (),
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    tell: Callable[[str], None] | None = None,
    grace: float | None = None,
    reading: Callable[[int], object] = lambda tokens: None,
) -> Result:
    """Trains a sparse autoencoder and writes it to `OUT/final`.

    `OUT` also gets `config.yaml`, `metrics.jsonl` and `checkpoints/`. In a distributed run every process
    makes this call on a shared file system; each reads the rows its devices need.

    Args:
        config: a YAML file or what it would hold (`mergelab.sae.training.config`).
        out: a new folder, or with `resume` that of an earlier run.
        resume: continue from the newest whole checkpoint; without one the run begins anew. On the same
            devices the result is bit for bit that of a run that was never stopped. The result of a run that
            has finished is returned as it is. With more `train.tokens` than before, a run, finished or not,
            goes on from its newest checkpoint as one of that length.
        overrides: `section.key=value`, as for `--set`.
        progress: function that is called for every logged step.
        notice: function that is told what the user should know, such as a damaged checkpoint that was passed
            over; a Python warning if None.
        tell: function that is told, line by line, what the rows look like before the first step.
        grace: seconds after SIGTERM at which the process is ended, whether or not its checkpoint is written
            by then; None for no limit.
        reading: function that is called with the tokens of a text read so far, in another thread.

    Raises:
        SAEError: the configuration or the data is wrong, or another than that of the run to resume, or the
            training diverged; then the last good checkpoint is still there.
        OutputError: `out` holds a run already, is written by another one, or cannot be written; then the last
            whole checkpoint is still there.
        CheckpointError: activation files are missing or malformed.
        Terminated: SIGTERM came; a checkpoint of the step it came in has been written.
    """
    settings = load_config(config, overrides)
    notice = notice or _warn
    with RunFolder(Path(out), settings, resume=resume, notice=notice) as folder:
        known = folder.finished()
        if known is not None:
            mesh = None if settings.mesh is None else make_mesh(settings.mesh)
            steps, metrics = known
            found = load_sae(folder.final, mesh=mesh)
            return Result(Path(out) / "final", found, steps, metrics, PrefetchTrace(), resumed=True)
        return _train(settings, Path(out), folder, progress, notice, tell, grace, reading)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _train(
    settings: TrainConfig,
    out: Path,
    folder: RunFolder,
    progress: Progress | None,
    notice: Callable[[str], None],
    tell: Callable[[str], None] | None,
    grace: float | None,
    reading: Callable[[int], object],
) -> Result:
    mesh = None if settings.mesh is None else make_mesh(settings.mesh)
    share = text_share(settings, mesh, folder.text_lanes())
    data = open_data(settings.data, settings.train.build().tokens, share, folder.tokens, reading)
    data, held_out = hold_out(settings, data)
    start = start_training(settings, data, mesh)
    variant, recipe = start.variant, start.recipe
    distributed = jax.process_count() > 1
    with together("reading the data", distributed=distributed):
        folder.check_inputs()
        if not folder.begun:  # a run that has begun knows its inputs
            read_once(data.source, data.target)
    # An SAE remembers whose features it holds, so that it is never judged on another model. The process
    # that writes this asks alone: a model's digest takes reading all of it.
    host = host_metadata(settings.data) if jax.process_index() == 0 else {}
    known = {**host, **told_of_tokens(data.kept), **settings.metadata}
    # Sites that contradict the data are an error now, not after the training.
    SAEConfig("relu", sites=variant.sites, transcoder=transcodes(variant, known), metadata=known)
    overview = kept_overview(out, start.stream, recipe.tokens) if folder.begun else None
    sample = start.draw() if overview is None else None
    overview = overview or sample.overview  # pyright: ignore[reportOptionalMemberAccess]
    if tell is not None and jax.process_index() == 0:
        for line in overview.lines():
            tell(line)
    step = make_step(variant, recipe, mesh)
    # What is bad is found before anything is written; a run that has begun may have a checkpoint.
    state = None if folder.begun else _first_state(start, sample, notice)
    with together("writing the run's folder", distributed=distributed):
        lanes = 0 if share is None else share.lanes
        folder.claim(KnownOfRun(variant.d_in, variant.d_out, known), lanes)
        if sample is not None:
            folder.keep(sample)
            sample = None  # it is large
    check_shared(folder.path, distributed=distributed)
    with Checkpoints(out / "checkpoints", settings.checkpoint.keep) as checkpoints:
        done = _done(checkpoints, folder, notice) if folder.begun else None
        if done is not None:
            state, place = _restored(checkpoints, done, start, start.shapes())
            start.stream.restore(place)
        elif state is None:
            state = _first_state(start, StartSample.read(out, overview), notice)
        losses = None
        if held_out is not None:
            losses = ModelLoss(settings.train.model_loss_every, held_out, variant, recipe, known, mesh)
            line = losses.begin(state)
            if tell is not None and line:
                tell(line)
        run = _Run(start, overview, step, checkpoints, out, progress, grace, losses)
        try:
            state, trace = run.steps(state, done or 0)
        except CheckpointError:
            if checkpoints.latest() is None:  # the data is bad, and nothing would be lost
                folder.disclaim()
            raise
    summary = {name: value for name, value in run.last.items() if name != "step"}
    metadata = sae_metadata(settings, variant.name, known, summary, overview.facts())
    sae = finish_training(variant, recipe, state, metadata, mesh)
    save_sae(sae, out / "final", overwrite=folder.begun)
    with together("noting the result", distributed=distributed):
        folder.record(recipe.steps, run.last)
    return Result(out / "final", sae, recipe.steps, run.last, trace)


def _first_state(start: Start, sample: StartSample | None, notice: Callable[[str], None]) -> TrainState:
    """The state before the first step: of the sample that is kept, or of one that is drawn."""
    if not all(gathered_facts(sample is not None)) or sample is None:
        sample = start.draw()
    state, settings = start.state_from(sample.batch), start.settings
    if settings.start_from is not None:
        state = started_from(settings.start_from, start.variant, start.recipe, state, notice)
    return state


def _restored(
    checkpoints: Checkpoints, step: int, start: Start, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint and its place in the data, also where the run has been made longer since."""
    recipe = start.recipe
    before = checkpoints.recipe(step, start.settings.train)
    if before == recipe:
        return checkpoints.restore(step, like, recipe.batch_size)
    like = replace(like, average=like.params if before.ema_decay else {})
    state, place = checkpoints.restore(step, like, recipe.batch_size)
    # More text is read for more tokens: the order is another from here on.
    now = start.stream.state()
    return extended_state(state, before, recipe), {**place, **{n: now[n] for n in ("rows", "kept_rows")}}


def _done(checkpoints: Checkpoints, folder: RunFolder, notice: Callable[[str], None]) -> int | None:
    """The step a begun run goes on from; what is passed over is said."""
    found = checkpoints.find()
    if jax.process_index() == 0:
        goes_on = "the run begins anew" if found.step is None else f"the run goes on from step {found.step}"
        if found.passed_over:
            notice(f"{'; '.join(found.passed_over)}: passed over, {goes_on}")
        elif found.step is None:
            notice(f"{folder.path}: no checkpoint was written before the run stopped; {goes_on}")
    return found.step


class _Run:
    """The loop: steps, lines of metrics one logged step late, checkpoints, and the guard."""

    def __init__(
        self,
        start: Start,
        overview: Overview,
        step: Step,
        checkpoints: Checkpoints,
        out: Path,
        progress: Progress | None,
        grace: float | None,
        losses: ModelLoss | None = None,
    ) -> None:
        self.losses = losses
        self.start, self.recipe, self.step, self.checkpoints = start, start.recipe, step, checkpoints
        self.overview = overview
        self.every, self.log_every = start.settings.checkpoint.every, start.settings.checkpoint.log_every
        self.out, self.progress, self.grace = out, progress, grace
        self.last: dict[str, float] = {}
        self._loggers: list[Logger] = []
        self._file: MetricsFile | None = None
        self._first: Metrics = {}
        self._guard: DivergenceGuard | None = None
        self._began = (0.0, 0)

    def steps(self, state: TrainState, done: int) -> tuple[TrainState, PrefetchTrace]:
        if jax.process_index() == 0:
            config = self.start.settings.model_dump(mode="json") | {"rows": self.overview.facts()}
            self._file = MetricsFile(self.out / "metrics.jsonl", done)
            self._loggers = [self._file]
            self._loggers = [*open_loggers(self.start.settings.log_to, self.out, config, done), self._file]
        waiting: tuple[int, Metrics, Mapping[str, float]] | None = None
        self._began = (time.perf_counter(), done)
        try:
            with (
                Prefetch(self.start.stream, self.start.place) as batches,
                Termination(self.grace) as termination,
            ):
                for number in range(done + 1, self.recipe.steps + 1):
                    x, y = next(batches)
                    with DISPATCH:
                        state, metrics = self.step(state, x, y)
                    termination.unsaved = True
                    self._first = self._first or metrics
                    end = number == self.recipe.steps
                    stop = termination.due(number) and not end
                    save = (number % self.every == 0 or stop) and not end
                    measured = self.losses is not None and self.losses.due(number)
                    losses = self.losses.figures(state) if self.losses is not None and measured else {}
                    if number % self.log_every == 0 or save or end or measured:
                        # The step before is read while this one runs; the device never waits for the log.
                        if waiting is not None:
                            self._log(*waiting)
                        waiting = (number, metrics, losses)
                    if waiting is not None and (save or end):
                        self._log(*waiting)
                        waiting = None
                    if save:
                        self._save(number, state, batches.state())
                        termination.unsaved = False
                    if stop:
                        self.checkpoints.wait()
                        raise Terminated
                return state, batches.trace
        finally:
            for logger in self._loggers:
                logger.close()

    def _save(self, number: int, state: TrainState, place: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.sync()  # lines before a checkpoint are never written again
        _logger.info("checkpoint of step %d", number)
        self.checkpoints.save(number, state, {**place, TOKENS: self.start.settings.train.tokens})

    def _log(self, number: int, metrics: Metrics, losses: Mapping[str, float]) -> None:
        self.checkpoints.check()
        line = {name: float(np.asarray(value)) for name, value in metrics.items()}
        if self._guard is None:
            self._guard = DivergenceGuard(float(np.asarray(self._first["nmse"])))
        if self._guard.diverged(line):
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
            **losses,
            "tokens_per_second": rate,
        }
        for logger in self._loggers:
            logger.write(self.last)
        if self.progress is not None:
            self.progress(number, self.recipe.steps, self.last)


def finish_training(
    variant: Variant,
    recipe: TrainingRecipe,
    state: TrainState,
    metadata: Mapping[str, Any],
    mesh: Mesh | None,
) -> SAE:
    """The SAE, which stays on the mesh as the training's parameters lie there."""
    finish = partial(finished_sae, variant, recipe, metadata=metadata)
    needed = replace(state, mean={}, square={})
    shardings = None if mesh is None else sae_shardings(jax.eval_shape(finish, needed), mesh)
    return jax.jit(finish, out_shardings=shardings)(needed)
