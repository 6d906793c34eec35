"""Checkpoints of a training: its state, any pytree, and its place in the data, with digests."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from mergelab.checkpoints.json_data import read_json
from mergelab.checkpoints.manifest import first_fault, write_manifest
from mergelab.checkpoints.orbax_calls import call_orbax, orbax_reason
from mergelab.checkpoints.publish import sync_path
from mergelab.checkpoints.remote_output import mirror
from mergelab.errors import CheckpointError, MergelabError, OutputError
from mergelab.processes.agreement import agree, together
from mergelab.processes.termination import Terminated

__all__ = ["PLACE", "FoundCheckpoint", "StateCheckpoints"]

PLACE = "place/metadata"
"""File of a checkpoint that holds the place in the data, as JSON."""

_STATE, _PLACE = "state", "place"

_INTERRUPT_WAIT = 1.0
"""Seconds an interrupted run gives a checkpoint that is being written."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a folder of checkpoints has to go on from.

    Attributes:
        step: step of the newest whole checkpoint; None if there is none.
        passed_over: fault of each newer checkpoint, in words.
    """

    step: int | None
    passed_over: tuple[str, ...]


class StateCheckpoints:
    """A folder of checkpoints, of which the last few are kept; a context manager that finishes writing.

    A checkpoint is made under another name and gets its own when all of it, with a list of its files'
    digests, is on the disk. One process writes in the background; several write together, each what its
    devices hold.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = Path(folder).absolute(), keep
        self._distributed = jax.process_count() > 1
        self._first = jax.process_index() == 0
        self._latest: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def find(self) -> FoundCheckpoint:
        """Looks for the newest checkpoint whose files are all there with the content that was written.

        One process looks, and tells the others.

        Raises:
            OutputError: the folder is none.
        """
        passed: list[str] = []
        found = -1
        with together("looking for checkpoints", distributed=self._distributed):
            for step in sorted(self._steps(), reverse=True) if self._first else ():
                fault = self.fault(step)
                if fault is None:
                    found = step
                    break
                passed.append(f"{self.folder / str(step)} {fault}")
        found = agree(found, distributed=self._distributed)
        self._latest = None if found < 0 else found
        return FoundCheckpoint(self._latest, tuple(passed))

    def steps(self) -> list[int]:
        """The steps of all checkpoints there are, whole or not, oldest first."""
        return sorted(self._steps())

    def fault(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step, in words; None if it is whole."""
        return first_fault(self.folder / str(step)) or self._place_fault(step)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint known."""
        return self._latest

    def save(self, step: int, state: Any, place: Mapping[str, Any]) -> None:
        """Copies the state and writes it, in the background where this process writes alone.

        Raises:
            OutputError: this one, or the one before it, cannot be written.
            MeshError: that happened in another process.
        """
        self.wait()
        tree = _as_tree(state)
        if self._distributed:
            self._write_together(step, tree, dict(place))
            return
        held = jax.device_get(tree)
        if jax.default_backend() == "cpu":
            # Arrays of a CPU are seen where they lie, and the next step uses that memory up.
            held = jax.tree.map(lambda leaf: np.array(leaf, copy=True), held)
        self._thread = threading.Thread(
            target=self._write_alone, args=(step, held, dict(place)), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Waits for what is being written.

        Raises:
            OutputError: it cannot be.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what a writing in the background ended with.

        Raises:
            OutputError: it failed.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step, laid out like another on its devices, and the place in the data.

        Args:
            step: step of the checkpoint.
            like: a state of the same shapes.

        Raises:
            CheckpointError: it cannot be read.
        """
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_tree(like)
        )
        folder = self.folder / str(step)

        def read() -> Any:
            import orbax.checkpoint as ocp
            from etils import epath

            with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                found = handler.restore(epath.Path(folder / _STATE), args=ocp.args.StandardRestore(shapes))
                return jax.block_until_ready(found)

        try:
            found = call_orbax(read)
            place = read_json(folder / _PLACE / "metadata")
        except MergelabError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(
                f"{folder}: cannot be restored ({orbax_reason(error)}); remove it to go on from another"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(found)), dict(place)

    def __enter__(self) -> Self:
        """Makes the folder and clears what a killed run left under other names."""
        with together("preparing the checkpoints", distributed=self._distributed), self._sentence(None):
            if self._first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for entry in self.folder.iterdir():
                    if entry.name.startswith(".") or ".orbax-checkpoint-tmp" in entry.name:
                        _remove(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # The error under way is the one to be told. A user who interrupts does not wait for a slow disk.
            hurry = issubclass(kind, KeyboardInterrupt) and not issubclass(kind, Terminated)
            self._thread.join(_INTERRUPT_WAIT if hurry else None)

    def _steps(self) -> list[int]:
        if not self.folder.exists():
            return []
        try:
            names = [entry.name for entry in self.folder.iterdir()]
        except OSError as error:
            raise OutputError(
                f"{self.folder}: no place for checkpoints ({error.strerror}); remove it, or choose "
                "another folder"
            ) from error
        return [int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name]

    def _place_fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint whose files are as they were listed."""
        folder = self.folder / str(step)
        try:
            place = read_json(folder / _PLACE / "metadata")
        except CheckpointError:
            return f"has no readable {_PLACE}/metadata"
        if not isinstance(place, dict) or not (folder / _STATE).is_dir():
            return f"lacks its {_STATE}"
        return None

    def _write_alone(self, step: int, tree: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        try:
            with self._sentence(step):
                work = self._prepare(step)
                _write_state(work, tree)
                self._complete(step, work, place)
        except BaseException as error:  # told to the training by the next call
            self._error = error

    def _write_together(self, step: int, tree: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        work = self.folder / f".{step}.partial"
        with together("preparing a checkpoint", distributed=True), self._sentence(step):
            if self._first:
                self._prepare(step)
        with together("writing a checkpoint", distributed=True), self._sentence(step):
            _write_state(work, tree, finalize=False)
        with together("completing a checkpoint", distributed=True), self._sentence(step):
            if self._first:
                _finalize(work)
                self._complete(step, work, place)
        self._latest = step

    def _prepare(self, step: int) -> Path:
        work = self.folder / f".{step}.partial"
        _remove(work)
        (work / _STATE).mkdir(parents=True)
        return work

    def _complete(self, step: int, work: Path, place: Mapping[str, Any]) -> None:
        """Adds the place and the list of digests, gives the checkpoint its name, and drops old ones."""
        (work / _PLACE).mkdir()
        (work / _PLACE / "metadata").write_text(json.dumps(dict(place)), encoding="utf-8")
        write_manifest(work)
        target = self.folder / str(step)
        _remove(target)  # one that was passed over
        work.rename(target)
        sync_path(self.folder)
        self._latest = step
        steps = self._steps()
        kept = sorted(found for found in steps if found <= step)[-self.keep :]
        for found in steps:  # those of later steps were passed over
            if found not in kept:
                _remove(self.folder / str(found))
        mirror(self.folder.parent)

    @contextlib.contextmanager
    def _sentence(self, step: int | None) -> Iterator[None]:
        """Turns what the system or Orbax refuses into one sentence."""
        try:
            yield
        except MergelabError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            what = self.folder if step is None else self.folder / str(step)
            good = (
                "no checkpoint is whole yet"
                if self._latest is None
                else f"the last whole checkpoint is {self.folder / str(self._latest)}"
            )
            with contextlib.suppress(OSError):
                if step is not None and self._first:
                    _remove(self.folder / f".{step}.partial")
            raise OutputError(
                f"{what}: cannot be written ({orbax_reason(error)}); {good}: free some space or check the "
                "disk, then go on with --resume"
            ) from error


def _write_state(work: Path, tree: Mapping[str, Any], *, finalize: bool = True) -> None:
    def write() -> None:
        import orbax.checkpoint as ocp
        from etils import epath

        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            folder = epath.Path(work / _STATE)
            handler.save(folder, args=ocp.args.StandardSave(dict(tree)))
            if finalize:
                handler.finalize(folder)

    call_orbax(write)


def _finalize(work: Path) -> None:
    def finalize() -> None:
        import orbax.checkpoint as ocp
        from etils import epath

        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            handler.finalize(epath.Path(work / _STATE))

    call_orbax(finalize)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_tree(state: Any) -> dict[str, Any]:
    """The leaves of a state by number, in their order."""
    leaves = jax.tree.leaves(state)
    return {f"{index:03d}": leaf for index, leaf in enumerate(leaves)}
