"""The log of a run: every trace as a line of JSON, and behind those of a task what they came to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json_object, read_json_object
from mergelab.checkpoints.output_target import check_vacant, disk_errors
from mergelab.checkpoints.publish import publish_file
from mergelab.checkpoints.text_file import MAX_PROSE, read_bytes
from mergelab.errors import CheckpointError, OutputError

__all__ = ["LOG", "SETTINGS", "TraceLog"]

LOG, SETTINGS = "traces.jsonl", "settings.json"
_KIND = "mergelab solve"
_OURS = re.compile(
    r"\.?(traces\.jsonl|settings\.json|results\.json|table\.txt|accuracy\.svg|traces\.html"
    r"|(probe|shuffled|random)-[\w.]+\.safetensors)(\.partial|\.lock)?"
)
"""What a run writes, and what is left of it where it was killed; what else lies there is the user's."""


class TraceLog:
    """Traces and outcomes by task, in a folder or in memory.

    A task is done when its outcome is logged. What a killed run has logged of a task that is not done is cut
    off, and made again: the same draws give the same traces.

    Attributes:
        tasks: traces of each task that is done, and its outcome.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begins a log, or goes on with one.

        Args:
            folder: where it is kept; nowhere if None. Whoever gives one holds its lock.
            settings: all that decides the results, as plain data.
            overwrite: whether the results of other settings may be replaced.

        Raises:
            OutputError: the folder holds something else, or the results of other settings.
            CheckpointError: a line is damaged.
        """
        self.tasks: dict[int, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        self._folder, self._settings, self._begun = folder, _plain(settings), folder is None
        if folder is None or not folder.is_dir():
            return
        with disk_errors(folder):
            # What a run leaves that is killed while it writes the settings is no more than their beginning.
            others = [name for name in os.listdir(folder) if not name.startswith(f".{SETTINGS}.")]
        if SETTINGS not in others:
            if others:
                check_vacant(folder, overwrite=False)
        elif self._goes_on(folder, overwrite):
            self._begun = True
            if LOG in others:
                self._read(folder / LOG)

    def begin(self) -> None:
        """Makes the folder, and says in it what the results are of, if that has not been done."""
        if self._folder is not None and not self._begun:
            with disk_errors(self._folder):
                self._folder.mkdir(exist_ok=True)
            content = {"kind": _KIND, "settings": self._settings}
            publish_file(self._folder / SETTINGS, (json.dumps(content, indent=1) + "\n").encode())
        self._begun = True

    def _goes_on(self, folder: Path, overwrite: bool) -> bool:
        found = read_json_object(folder / SETTINGS)
        recorded = found.get("settings")
        if found.get("kind") != _KIND or not isinstance(recorded, dict):
            raise OutputError(f"{folder} was not written by mergelab solve; choose another folder")
        given = self._settings
        differ = [key for key in {**recorded, **given} if recorded.get(key) != given.get(key)]
        if not differ:
            return True
        if not overwrite:
            raise OutputError(
                f"{folder} holds the results of other settings: {', '.join(differ)} differ; give what that "
                "run was given, choose another folder, or pass --overwrite to replace them"
            )
        with disk_errors(folder):
            # The settings go last: by them the folder is known, whenever this is cut off.
            ours = sorted(name for name in os.listdir(folder) if _OURS.fullmatch(name))
            for name in (*(name for name in ours if name != SETTINGS), SETTINGS):
                (folder / name).unlink()
        return False

    def _read(self, path: Path) -> None:
        content = read_bytes(path, MAX_PROSE)
        whole, kept = content.rfind(b"\n") + 1, 0
        traces: list[dict[str, Any]] = []
        place = 0
        for number, line in enumerate(content[:whole].splitlines(keepends=True), 1):
            place += len(line)
            record = parse_json_object(line, f"{path}, line {number}")
            task, outcome = record.get("task"), record.get("outcome")
            if not isinstance(task, int):
                raise CheckpointError(f"{path}: line {number} is damaged; pass --overwrite to solve anew")
            if not isinstance(outcome, dict):
                traces.append(record)
                continue
            self.tasks[task] = traces, outcome
            traces, kept = [], place
        if kept < len(content):
            with disk_errors(path):
                os.truncate(path, kept)

    def add(self, task: int, traces: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any]) -> None:
        """Logs a task that is done.

        Args:
            task: its number, from 0 on.
            traces: its traces, as plain data.
            outcome: what they came to.
        """
        self.begin()
        lines = [_plain({"task": task, **trace}) for trace in traces]
        last = _plain({"task": task, "outcome": outcome})
        self.tasks[task] = lines, last["outcome"]
        if self._folder is not None:
            text = "".join(json.dumps(line) + "\n" for line in [*lines, last])
            with disk_errors(self._folder), (self._folder / LOG).open("ab") as file:
                file.write(text.encode())


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as JSON gives it back."""
    return parse_json_object(json.dumps(data).encode(), "the line")
