"""Scores kept in a file as they are found, so that a long evaluation goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.capture import ModelActivations
from mergelab.checkpoints.json_data import parse_json_object
from mergelab.checkpoints.output_target import disk_errors
from mergelab.checkpoints.text_file import read_bytes
from mergelab.errors import CheckpointError, OutputError
from mergelab.sae.dictionary import Dictionary
from mergelab.sae.evaluation.metrics import Score
from mergelab.sae.evaluation.scorecard import Scorecard

__all__ = ["Journal", "evaluation_key"]

_BEGINNING = b'{"key": "'


def evaluation_key(
    dictionary: Dictionary, source: ModelActivations, labels: Mapping[str, np.ndarray], *settings: Any
) -> str:
    """SHA-256 of what scores depend on.

    Args:
        dictionary: that is judged; its metadata does not count.
        source: its tokens and sites count; its weights must be among the settings (`weights_sha256`).
        labels: answers to probing tasks.
        settings: all else, through `repr`.
    """
    config = replace(dictionary.config, metadata={})
    total = hashlib.sha256(
        repr((source.sites, source.framed, source.tokens.shape, config, settings)).encode()
    )
    for name, array in {"tokens": source.tokens, **labels, **dictionary.as_numpy()}.items():
        total.update(name.encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


class Journal(MutableMapping[str, Scorecard]):
    """Scores by metric, of one evaluation among those of a file: the `memory` of `scorecard`.

    Every line of the file is one metric of one evaluation; a last line that a stop has torn is cut off.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Reads what is known.

        Args:
            path: the file, which need not exist.
            key: of the evaluation (`evaluation_key`).

        Raises:
            OutputError: the file cannot be read, or is no journal.
        """
        self.path, self.key = path, key
        self._found: dict[str, Scorecard] = {}
        try:
            lines = read_bytes(path, error=OutputError).splitlines(keepends=True) if path.exists() else []
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error.strerror}); choose another file.") from error
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json_object(line, "the line")
                if entry["key"] == key:
                    self._found[entry["metric"]] = _card(entry)
            except (CheckpointError, ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{path}, line {number}: is no line of an evaluation's journal; choose another file."
                ) from error
        if torn:
            self._cut_off(torn)

    def _cut_off(self, torn: bytes) -> None:
        """Cuts off a torn last line, if it is the beginning of one of ours and not a text of the user's."""
        if torn[: len(_BEGINNING)] != _BEGINNING[: len(torn)]:
            raise OutputError(
                f"{self.path}: its last line is no line of an evaluation's journal; choose another file."
            )
        with disk_errors(self.path):
            os.truncate(self.path, self.path.stat().st_size - len(torn))

    def __getitem__(self, metric: str) -> Scorecard:
        return self._found[metric]

    def __setitem__(self, metric: str, card: Scorecard) -> None:
        scores = {
            name: asdict(score) | {"value": score.value if np.isfinite(score.value) else repr(score.value)}
            for name, score in card.scores.items()
        }
        entry = {"key": self.key, "metric": metric, "scores": scores, "seconds": dict(card.seconds)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); check the disk."
            ) from error
        self._found[metric] = card

    def __delitem__(self, metric: str) -> None:
        raise OutputError(f"{self.path}: what was found is not taken back; choose another file.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _card(entry: dict[str, Any]) -> Scorecard:
    scores = {
        name: Score(float(score["value"]), score["unit"], score["against"])
        for name, score in entry["scores"].items()
    }
    return Scorecard(scores, {name: float(value) for name, value in entry["seconds"].items()})
