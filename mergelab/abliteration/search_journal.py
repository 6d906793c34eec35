"""What a search has tried, line by line in a file: it is gone on with, and its trials are written later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.text_file import MAX_TABLE, read_bytes
from mergelab.errors import CheckpointError, OutputError

__all__ = ["SearchJournal"]

_VERSION = 1
_KIND = "mergelab search of an ablation"
_HEAD = json.dumps({"kind": _KIND})[:-1].encode()


class SearchJournal:
    """JSON lines: what is searched, the candidates among the directions, then each trial's figures.

    A search is decided by what it was given and by the figures so far, so that figures that are here need not
    be measured again. A process that is killed leaves at most one torn last line, which is dropped.

    Attributes:
        path: the file; it appears with the first figures.
        selection: the figures of all candidates, as `DirectionSelection.to_json` gives them, or None.
        rows: figures of the unedited model, then those of each trial; with the point of each.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], *, overwrite: bool = False) -> None:
        """Reads what is there.

        Args:
            path: the file, which need not exist.
            identity: digest of each thing that decides the figures, by a name for messages.
            overwrite: whether the journal of another search may be replaced.

        Raises:
            OutputError: the file is the journal of another search, or none at all.
            CheckpointError: it cannot be read, or a line in its middle is damaged.
        """
        self.path = path
        self.selection: dict[str, Any] | None = None
        self.rows: list[tuple[list[float], list[float]]] = []
        self._identity = dict(identity)
        self._stale = False
        self._begun = path.exists()
        if self._begun:
            self._read(overwrite)

    def _read(self, overwrite: bool) -> None:
        content = read_bytes(self.path, MAX_TABLE)
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        if not lines and _HEAD.startswith(content[: len(_HEAD)]):
            self._stale = True  # killed within the first line
            return
        head = self._parse(lines[0], 1) if lines else {}
        if head.get("kind") != _KIND:
            raise OutputError(
                f"{self.path} is not the journal of a search; move it away, or name another journal"
            )
        recorded = head.get("identity")
        recorded = recorded if isinstance(recorded, dict) and head.get("version") == _VERSION else {}
        if recorded != self._identity:
            differ = [k for k in {**recorded, **self._identity} if recorded.get(k) != self._identity.get(k)]
            if not overwrite:
                raise OutputError(
                    f"{self.path} is the journal of another search: {', '.join(differ)} differ; give what "
                    "that one was given, name another journal, or pass --overwrite to search anew"
                )
            self._stale = True
            return
        for number, line in enumerate(lines[1:], 2):
            record = self._parse(line, number)
            if isinstance(record.get("selection"), dict):
                self.selection = record["selection"]
            else:
                point, figures = (self._numbers(record, name, number) for name in ("point", "figures"))
                self.rows.append((point, figures))
        if whole < len(content):
            with disk_errors(self.path):
                os.truncate(self.path, whole)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        found = parse_json(line, f"{self.path}, line {number}")
        if not isinstance(found, dict):
            raise self._damaged(number)
        return found

    def _numbers(self, record: Mapping[str, Any], name: str, number: int) -> list[float]:
        found = record.get(name)
        if not isinstance(found, list) or not all(type(value) is float for value in found):
            raise self._damaged(number)
        return found

    def _damaged(self, number: int) -> CheckpointError:
        return CheckpointError(f"{self.path}: line {number} is damaged; delete the file to search anew")

    def row(self, index: int, point: Sequence[float], count: int) -> list[float] | None:
        """The figures recorded of a point, or None where the journal ends before it.

        Args:
            index: how many points were before it.
            point: the point.
            count: number of figures that each has.

        Raises:
            CheckpointError: another point, or other figures, are recorded in its place.
        """
        if index >= len(self.rows):
            return None
        recorded, figures = self.rows[index]
        same = len(recorded) == len(point) and all(map(math.isclose, recorded, point))
        if not same or len(figures) != count:
            raise self._damaged(index + 3)
        return figures

    def record_selection(self, selection: Mapping[str, Any]) -> None:
        """Appends the figures of the candidates."""
        self.selection = dict(selection)
        self._append([{"selection": self.selection}])

    def record(self, points: Sequence[Sequence[float]], figures: Sequence[Sequence[float]]) -> None:
        """Appends the figures of some points, in order."""
        new = [
            ([float(value) for value in point], [float(value) for value in row])
            for point, row in zip(points, figures, strict=True)
        ]
        self.rows += new
        self._append([{"point": point, "figures": row} for point, row in new])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record) for record in records]
        if self._stale or not self._begun:
            head = {"kind": _KIND, "version": _VERSION, "identity": self._identity}
            lines.insert(0, json.dumps(head))
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("wb" if self._stale else "ab") as file:
                file.write(("\n".join(lines) + "\n").encode())
        self._stale, self._begun = False, True
