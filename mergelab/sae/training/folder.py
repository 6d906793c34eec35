"""A run's folder: whose it is, what may go on in it, and what is known of a run that has finished."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import yaml

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.manifest import file_fault, list_files, write_whole
from mergelab.checkpoints.output_target import OutputLock, check_target, disk_errors
from mergelab.checkpoints.publish import WorkFolder
from mergelab.checkpoints.text_file import read_text
from mergelab.errors import CheckpointError, MergelabError, OutputError, SAEError
from mergelab.processes.agreement import agree, together
from mergelab.sae.training.config import TrainConfig
from mergelab.sae.training.inputs import check_same, fingerprint, input_paths
from mergelab.sae.training.settings_text import plain_settings
from mergelab.sae.training.start_sample import START_SAMPLE, StartSample

__all__ = ["KnownOfRun", "RunFolder", "known_of_run"]

_CONFIG, _INPUTS, _RESULT, _FINAL = "config.yaml", "inputs.json", "result.json", "final"
_LANES = "text_lanes"
_TOKENS = "tokens"
_THEN = "go on with --resume"


class RunFolder:
    """The folder of one run; a context manager that holds its lock in process 0.

    Attributes:
        path: the folder.
        final: folder of the finished SAE.
        begun: whether a run of this configuration has begun there before.
    """

    def __init__(
        self, path: Path, settings: TrainConfig, *, resume: bool, notice: Callable[[str], None]
    ) -> None:
        """Derives the names; touches nothing.

        Args:
            path: the folder that is asked for.
            settings: configuration of the training.
            resume: whether an earlier run may go on.
            notice: function that is told what a user should know, one sentence each, in process 0.
        """
        self.path = Path(path).absolute()
        self.final = self.path / _FINAL
        self.begun = False
        self._shown = path
        self._settings, self._resume, self._notice = settings, resume, notice
        self._distributed = jax.process_count() > 1
        self._first = jax.process_index() == 0
        self._lock: OutputLock | None = None
        self._made = self._claimed = False
        self._inputs: dict[str, Any] | None = None
        self._before: int | None = None  # tokens of a run that is made longer

    def __enter__(self) -> Self:
        """Checks the folder and takes its lock; nothing is written into it yet.

        Raises:
            OutputError: it holds another run, or something else, or another process is writing it.
            SAEError: the run to resume has another configuration.
            MeshError: that happened in another process.
        """
        try:
            with together("opening the run's folder", distributed=self._distributed):
                if self._first:
                    check_target(self.path, input_paths(self._settings.data, self._settings.start_from))
                    lock = OutputLock(self.path)
                    lock.acquire()
                    self._lock = lock
                    with disk_errors(self.path):
                        self._look()
        except BaseException:
            self._release()
            raise
        self.begun = bool(agree(int(self.begun), distributed=self._distributed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, MergelabError) and self._first and not self.begun and not self._claimed:
            self._forget(_TOKENS)  # the same call would end the same way
        self._release()

    def _forget(self, *folders: str) -> None:
        for name in folders:
            shutil.rmtree(self.path / name, ignore_errors=True)
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            lock.release()

    def _look(self) -> None:
        if not self.path.exists():
            self._made = True
            return
        names = {entry.name for entry in self.path.iterdir()}
        if _FINAL in names and not self._resume:
            raise OutputError(f"{self._shown / _FINAL}: a finished run is there; choose another folder")
        if _CONFIG in names:
            if not self._resume:
                raise OutputError(
                    f"{self._shown}: an unfinished run is there; pass --resume, or choose another folder"
                )
            self._check_config()
            self.begun = True
            with WorkFolder(self.final):  # completes, or clears, what a kill left of publishing it
                pass
        elif names - {_TOKENS, f".{_CONFIG}.partial", f".{_INPUTS}.partial", _INPUTS}:
            # What else there may be is what a run leaves that was killed in its first moment.
            raise OutputError(f"{self._shown} is not empty and holds no run; choose another folder")

    def _check_config(self) -> None:
        written = self.path / _CONFIG
        try:
            before = plain_settings(read_text(written))
        except MergelabError as error:
            raise OutputError(
                f"{written}: cannot be read ({type(error).__name__}), so it is not known what run this is; "
                "choose another folder"
            ) from error
        # Through the same text: what one reader takes for a number another may take for a word.
        now = plain_settings(yaml.safe_dump(self._settings.model_dump(mode="json"), sort_keys=False))
        before = self._made_longer(before, now)
        changed = _first_difference(before, now)
        if changed is not None:
            raise SAEError(f"{written}: the run began with {changed}; resume it as it was, or begin another.")

    def _made_longer(self, before: Any, now: Any) -> Any:
        """The configuration a run began with, with more tokens where it is to have more."""
        section = before.get("train") if isinstance(before, dict) else None
        tokens = section.get("tokens") if isinstance(section, dict) else None
        if not isinstance(section, dict) or not isinstance(tokens, int) or tokens >= now["train"]["tokens"]:
            return before
        self._before = tokens
        return {**before, "train": {**section, "tokens": now["train"]["tokens"]}}

    @property
    def tokens(self) -> Path | None:
        """Folder in which a single process keeps the tokens of a text until the run has finished."""
        return None if self._distributed else self.path / _TOKENS

    def finished(self) -> tuple[int, dict[str, float]] | None:
        """Steps and metrics of a run that has finished, its SAE proved to be what was written.

        An SAE that has been damaged is made again from the last checkpoint; a notice says so.

        Raises:
            SAEError: the inputs have changed since.
            MeshError: that happened in another process.
        """
        result: tuple[int, dict[str, float]] | None = None
        with together("looking for the run's result", distributed=self._distributed):
            if self._first and self.begun and self.final.exists():
                result = self._read_result()
        if not agree(int(result is not None), distributed=self._distributed):
            return None
        return result or self._read_result()

    def _read_result(self) -> tuple[int, dict[str, float]] | None:
        try:
            said = read_json_object(self.path / _RESULT)
            steps, metrics = int(said["steps"]), {str(k): float(v) for k, v in said["metrics"].items()}
            fault = file_fault(self.final, said["files"])
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError):
            # Killed between the SAE and this record: both are made again.
            return None
        if steps != self._settings.train.build().steps:
            return None  # of a run that has been made longer
        if fault is not None:
            if self._first:
                self._notice(f"{self.final} {fault}; it is made again from the run's last checkpoint")
            return None
        return steps, metrics

    def record(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Notes the result of a run whose SAE is in its place."""
        if self._first:
            with disk_errors(self.path, _THEN):
                said = {"steps": steps, "metrics": dict(metrics), "files": list_files(self.final)}
                write_whole(self.path / _RESULT, json.dumps(said, indent=1) + "\n")
            shutil.rmtree(self.path / _TOKENS, ignore_errors=True)

    def check_inputs(self) -> None:
        """Takes the inputs' fingerprints, which must be those a begun run noted.

        Raises:
            SAEError: an input has changed.
            OutputError: the note is missing or damaged.
        """
        if not self._first:
            return
        self._inputs = fingerprint(self._settings.data, self._settings.start_from)
        if not self.begun:
            return
        path = self.path / _INPUTS
        try:
            before = read_json_object(path)["files"]
        except (CheckpointError, KeyError) as error:
            raise OutputError(
                f"{path}: cannot be read ({type(error).__name__}), so the data may be other than it was; "
                "begin another run"
            ) from error
        check_same(self.path, before, self._inputs)

    def text_lanes(self) -> int | None:
        """Lanes in which the processes that began the run share its text, 0 for none; None for a new run.

        The same in every process, each of which must ask.
        """
        lanes = 0
        if self._first and self.begun:
            with contextlib.suppress(CheckpointError):
                said = read_json_object(self.path / _INPUTS).get(_LANES)
                lanes = said if isinstance(said, int) and said > 0 else 0
        lanes = agree(lanes, distributed=self._distributed)
        return lanes if self.begun else None

    def claim(self, known: KnownOfRun | None = None, text_lanes: int = 0) -> None:
        """Says in the folder what run it holds, if it does not yet: from here on it is resumed.

        Args:
            known: what is known of what it reads, for those who look at its checkpoints.
            text_lanes: lanes in which processes share its text; 0 for none.
        """
        if not self._first or (self.begun and self._before is None):
            return
        with disk_errors(self.path):
            if not self.begun:
                self.path.mkdir(exist_ok=True)
                said = {"files": self._inputs} | ({} if known is None else {"known": asdict(known)})
                said |= {_LANES: text_lanes} if text_lanes else {}
                text = json.dumps(said, indent=1) + "\n"
                write_whole(self.path / _INPUTS, text)
            else:
                more = self._settings.train.tokens
                self._notice(
                    f"{self.path}: the run of {self._before:,} tokens is made one of {more:,}; the learning "
                    "rate goes on as a run of that length has it at this step, with the peak of before"
                )
            self._claimed = True
            settings = self._settings.model_dump(mode="json")
            write_whole(self.path / _CONFIG, yaml.safe_dump(settings, sort_keys=False))

    def keep(self, sample: StartSample) -> None:
        """Keeps the start sample, so that a run that is resumed need not read it again."""
        if self._first:
            with disk_errors(self.path):
                sample.write(self.path)

    def disclaim(self) -> None:
        """Takes back what `claim` wrote: the data was found bad before anything could be kept."""
        if not self._first or self.begun:
            return
        for name in (_CONFIG, _INPUTS, START_SAMPLE, "metrics.jsonl", "wandb-id"):
            (self.path / name).unlink(missing_ok=True)
        self._forget(_TOKENS, "checkpoints", "tensorboard", "wandb")


@dataclass(frozen=True)
class KnownOfRun:
    """What a run's folder says of the activations it reads.

    Attributes:
        d_in: their width.
        d_out: width of the targets; None where the input is reconstructed.
        metadata: what an SAE of it says of them.
    """

    d_in: int
    d_out: int | None
    metadata: dict[str, Any]


def known_of_run(folder: Path) -> KnownOfRun | None:
    """What a run's folder says of the activations it reads; None if it does not.

    Raises:
        CheckpointError: the file that says it cannot be read.
    """
    try:
        return KnownOfRun(**read_json_object(folder / _INPUTS)["known"])
    except (KeyError, TypeError):
        return None


def _first_difference(before: Any, now: Any, path: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*before, *(key for key in now if key not in before)):
            place = f"{path}.{key}" if path else str(key)
            # Where a run may go on differently: its devices, and what is kept on the way.
            if place not in ("mesh", "data.model_mesh", "checkpoint", "log_to"):
                found = _first_difference(before.get(key), now.get(key), place)
                if found is not None:
                    return found
        return None
    return None if before == now else f"{path}: {before}, not {now}"
