"""Runs named stages once: a stage whose key is on record and whose product exists is not run again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import read_json_object
from mergelab.checkpoints.publish import publish_file
from mergelab.errors import CheckpointError, OutputError
from mergelab.version import __version__

__all__ = ["Stages", "remove", "stage_key"]

RECORD = "stages.json"


def stage_key(*parts: Any) -> str:
    """SHA-256 of the parts (through `repr`) and of this package's version."""
    return hashlib.sha256(repr((__version__, *parts)).encode()).hexdigest()


class Stages:
    """The stages done in an output folder, and what they returned.

    `stages.json` is rewritten after each stage, so an interrupted run goes on where it stopped.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """Opens or creates the output folder.

        Args:
            folder: the output folder.
            force: forget what was done before.

        Raises:
            OutputError: the folder holds something that no quickstart wrote.
        """
        self.folder = folder
        self.record = folder / RECORD
        if folder.exists() and not self.record.is_file() and not _only_begun(folder):
            raise OutputError(
                f"{folder} exists and was not written by the quickstart (it has no {RECORD}); "
                "choose another --out, or empty it first."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, Any] = {} if force else self._read()
        if not self.record.is_file() or force:
            self._write()

    def run(self, name: str, key: str, work: Callable[[Path], Any], product: str | None = None) -> Any:
        """Returns what the stage returned when it last ran with this key, running it if need be.

        Args:
            name: the stage.
            key: a digest of all it depends on.
            work: does it and returns plain JSON data; it gets the product's path, where nothing is yet, and
                must make the product appear there complete or not at all.
            product: the file or folder it makes, relative to the output folder; None if there is none.
        """
        target = self.folder / (product or "")
        known = self._done.get(name)
        if known and known["key"] == key and target.exists():
            return known["value"]
        if self._done.pop(name, None):
            self._write()  # before its product goes, so that a stop in between is not taken for success
        if product is not None:
            remove(target)
            target.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        value = work(target)
        self._done[name] = {"key": key, "value": value, "seconds": round(time.perf_counter() - started, 2)}
        self._write()
        return value

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it last ran."""
        return {name: entry["seconds"] for name, entry in self._done.items()}

    def _read(self) -> dict[str, Any]:
        try:
            return read_json_object(self.record)
        except CheckpointError:
            return {}  # no run yet, or a run killed in its first moment

    def _write(self) -> None:
        publish_file(self.record, (json.dumps(self._done, indent=1) + "\n").encode())


def _only_begun(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run killed in its first moment leaves."""
    return folder.is_dir() and all(entry.name.startswith(f".{RECORD}.") for entry in folder.iterdir())


def remove(path: Path) -> None:
    """Deletes a file or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
