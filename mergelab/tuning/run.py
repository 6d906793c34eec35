"""A model's folder and texts in, a fine-tuned folder out: a run that can be killed and resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mergelab.checkpoints.folder import FolderCheckpoint, open_checkpoint, stat_sha256
from mergelab.checkpoints.hub import hub_origin
from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.locations import local_path
from mergelab.checkpoints.manifest import write_whole
from mergelab.checkpoints.output_target import disk_errors, recorded_identity
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.remote_output import writes_anywhere
from mergelab.checkpoints.state_checkpoints import StateCheckpoints
from mergelab.errors import CheckpointError, OutputError
from mergelab.models.load import load_model, parameter_shapes
from mergelab.processes.stopping import Termination
from mergelab.text.corpus_files import CorpusFile, corpus_files
from mergelab.text.tokenizer import load_tokenizer
from mergelab.tuning.contexts import read_rows
from mergelab.tuning.preparation import check_teacher, prepare, tuned_params
from mergelab.tuning.settings import TuningSettings
from mergelab.tuning.steps import StepState
from mergelab.tuning.training import Hooks, Progress, Record, Tuning
from mergelab.tuning.writing import RECORD, Facts, write_tuned

__all__ = ["TunedFolder", "finetune_folder"]

_logger = logging.getLogger(__name__)

_SAVE_EVERY = 120.0
"""Seconds of training that a kill may undo."""

_KEPT = 2
"""Checkpoints that are kept while a run goes on."""


@dataclass(frozen=True)
class TunedFolder:
    """What a run wrote.

    Attributes:
        path: the folder of the model or adapter.
        facts: what its `finetune.json` says.
        finished_before: whether an earlier run had finished, so that nothing was trained.
    """

    path: Path
    facts: Mapping[str, Any]
    finished_before: bool = False


@writes_anywhere()
def finetune_folder(
    model: str | Path,
    texts: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: TuningSettings | None = None,
    *,
    held_out: str | Path | Sequence[str | Path] = (),
    teacher: str | Path | None = None,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    resume: bool = False,
    save_every: int | None = None,
    grace: float | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
    reading: Callable[[int], object] = lambda tokens: None,
) -> TunedFolder:
    """Fine-tunes a model's folder, and writes a model's folder, or with LoRA a PEFT adapter's.

    Checkpoints stand beside the output, under a hidden name, until it is finished.

    Args:
        model: folder or GGUF file of a decoder with its tokenizer, a model on the hub, or a URL.
        texts: files, globs, folders or data sets of texts or conversations.
        out: folder to write.
        settings: how.
        held_out: texts that are judged; a share of `texts` if there are none.
        teacher: model that the trained one is kept near to, by `settings.kl`.
        mesh: devices to spread it over.
        overwrite: replace a folder that mergelab wrote.
        resume: go on with a run of the same inputs and settings that was interrupted. On one device the
            result is bit for bit that of a run that was not.
        save_every: steps between checkpoints; two minutes if None.
        grace: seconds after SIGTERM at which the process is ended, whether or not a checkpoint is written.
        progress: function that is called with steps done, steps in all, and the figures of a step.
        tell: function that is told what memory the training takes, and held-out losses.
        reading: function that is called with the tokens read so far.

    Raises:
        TuningError: settings have no meaning, the text is too short, or the training diverged.
        CorpusError: a text cannot be read, or does not fill one context.
        CheckpointError: a model cannot be read.
        OutputError: the folder cannot be written, or the run to resume is another one.
        Terminated: SIGTERM came; a checkpoint of the step it came in has been written.
    """
    settings = settings or TuningSettings()
    settings.check(teacher=teacher is not None)
    tell = tell or Hooks.tell
    checkpoint = open_checkpoint(local_path(model))
    learned_files, judged_files = _files(texts), _files(held_out)
    other = None if teacher is None else open_checkpoint(local_path(teacher))
    if other is not None:
        check_teacher(parameter_shapes(checkpoint)[0], parameter_shapes(other)[0])
    files = [file.path for file in (*learned_files, *judged_files) if file.path is not None]
    origin = hub_origin(checkpoint.path)
    facts = Facts(
        model=checkpoint.path,
        base=str(model) if origin is None else origin.repo,
        texts=tuple(file.name for file in learned_files),
        held_out=tuple(file.name for file in judged_files),
        teacher=None if teacher is None else str(teacher),
        identity=_identity(settings, checkpoint, other, learned_files, judged_files, files),
    )
    inputs = [checkpoint.path, *([] if other is None else [other.path]), *files]
    with WorkFolder(out, inputs=inputs, overwrite=overwrite) as work:
        done_before = resume and recorded_identity(work.out) == facts.identity
        if work.finished(facts.identity) or done_before:
            work.abandon()
            return TunedFolder(Path(out), read_json_object(work.out / RECORD), finished_before=True)
        work.prepare()
        _claim(work, facts.identity, resume=resume)
        loaded, params = load_model(checkpoint, mesh=mesh)
        tokenizer = load_tokenizer(checkpoint.path)
        rows, judged = read_rows(
            loaded,
            tokenizer,
            learned_files,
            judged_files or None,
            settings,
            folder=work.stages / "tokens",
            reading=reading,
        )
        teaching = None if other is None else load_model(other, mesh=mesh)
        tuning, state = prepare(loaded, params, rows, judged, settings, teaching)
        tell(_announced(tuning, state))
        with (
            StateCheckpoints(work.stages / "checkpoints", _KEPT) as checkpoints,
            Termination(grace) as termination,
        ):
            run = _Checkpoints(checkpoints, termination, save_every)
            state, record = run.resumed(state, tell)
            hooks = Hooks(progress or Hooks.progress, tell, run.due, run.save)
            state = tuning.run(state, run.done, record, hooks)
        tuned = params if tuning.factors is not None else tuned_params(tuning, params, state.trained)
        write_tuned(tuning, tuned, state.trained, record, facts, work)
        return TunedFolder(Path(out), read_json_object(work.out / RECORD))


def _files(places: str | Path | Sequence[str | Path]) -> list[CorpusFile]:
    given: Iterable[str | Path] = [places] if isinstance(places, str | Path) else places
    return [file for one in given for file in corpus_files(one)]


def _identity(
    settings: TuningSettings,
    model: FolderCheckpoint,
    teacher: FolderCheckpoint | None,
    learned: Sequence[CorpusFile],
    judged: Sequence[CorpusFile],
    files: Sequence[Path],
) -> str:
    """Digest of all that decides the result; of texts on this machine size and time of change."""
    facts: list[Any] = ["1", asdict(settings), model.fingerprint(), teacher and teacher.fingerprint()]
    facts += [[file.name for file in side] for side in (learned, judged)]
    facts.append(stat_sha256(*files))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _claim(work: WorkFolder, identity: str, *, resume: bool) -> None:
    """Says beside the output what run its checkpoints are of; those of another are refused, or deleted."""
    note = work.stages / "run.json"
    if not resume:
        work.clear_stages()
    with disk_errors(work.out):
        if note.is_file():
            try:
                before = read_json_object(note).get("identity")
            except CheckpointError:
                before = None
            if before != identity:
                raise OutputError(
                    f"{work.out}: the run that was interrupted there had other settings, models or texts; "
                    "repeat its command with --resume, or begin anew without"
                )
            return
        work.stages.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"identity": identity}) + "\n")


def _announced(tuning: Tuning, state: StepState) -> str:
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    total = sum(leaf.size for leaf in tuning.loss.model.table())
    settings, context = tuning.settings, tuning.learned.tokens.shape[1]
    held = 0 if tuning.judged is None else len(tuning.judged.tokens)
    return (
        f"{trained:,} trained numbers ({trained / total:.2%} of the model's {total:,} parameters); "
        f"{tuning.optimizer.steps:,} steps of {settings.batch * settings.accumulate} contexts of {context} "
        f"tokens, of {len(tuning.learned.tokens):,} contexts; {held:,} held out"
    )


class _Checkpoints:
    """When checkpoints are due, and what they hold."""

    def __init__(self, checkpoints: StateCheckpoints, termination: Termination, every: int | None) -> None:
        self.checkpoints, self.termination, self.every = checkpoints, termination, every
        self.done = 0
        self._saved = time.monotonic()

    def resumed(self, state: StepState, tell: Callable[[str], object]) -> tuple[StepState, Record]:
        """The state to go on from, and the record up to it."""
        found = self.checkpoints.find()
        for fault in found.passed_over:
            tell(f"{fault}: passed over")
        if found.step is None:
            return state, Record()
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        del state
        restored, place = self.checkpoints.read(found.step, like)
        self.done = found.step
        tell(f"the run goes on from step {found.step:,}")
        return restored, Record(place["steps"], place["held_out"])

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether to save after a step, and whether to end with it."""
        self.termination.unsaved = True
        stop = self.termination.due(step)
        if self.every is not None:
            return step % self.every == 0 or stop, stop
        return stop or time.monotonic() - self._saved >= _SAVE_EVERY, stop

    def save(self, step: int, state: StepState, record: Record) -> None:
        """Keeps the state of a step, and all that was recorded up to it."""
        _logger.info("checkpoint of step %d", step)
        # Copies: a thread writes them while the next steps add to the record.
        self.checkpoints.save(step, state, {"steps": [*record.steps], "held_out": [*record.held_out]})
        if self.termination.due(step):
            self.checkpoints.wait()
        self.termination.unsaved = False
        self._saved = time.monotonic()
