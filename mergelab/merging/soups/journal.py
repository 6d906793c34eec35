"""The journal of evaluations that lets an interrupted greedy soup of folders go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergelab.checkpoints.json_data import read_json_object
from mergelab.errors import CheckpointError, OutputError
from mergelab.merging.soups.scores import Scores

__all__ = ["Journal"]


@dataclass
class Journal:
    """Scores of soups by their members, on disk after every evaluation.

    The search itself is deterministic and cheap: run again over remembered scores it makes the same
    decisions, so evaluations are all that need be kept.

    Attributes:
        path: the file.
        subject: what the scores are of (evaluator, fingerprints of the candidates); a journal of another
            subject is refused.
        scores: by members, in the order in which they were added.
    """

    path: Path
    subject: Mapping[str, object]
    scores: dict[tuple[str, ...], Scores] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, subject: Mapping[str, object]) -> Journal:
        """Returns the journal at `path`, empty if there is none.

        Raises:
            OutputError: it is unreadable, or of another subject.
        """
        if not path.exists():
            return cls(path, subject)
        try:
            data = read_json_object(path)
            scores = {tuple(entry["members"]): entry["scores"] for entry in data["scores"]}
            found = dict(data["subject"])
        except (CheckpointError, AttributeError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is not a readable journal of a greedy soup; start again with --overwrite."
            ) from error
        if odd := next((key for key in subject if found.get(key) != subject[key]), None):
            raise OutputError(
                f"{path} is of an interrupted soup with different {odd}; start again with --overwrite, or "
                "choose another output folder."
            )
        return cls(path, subject, scores)

    def record(self, members: tuple[str, ...], scores: Scores) -> None:
        """Adds one evaluation and writes the file anew."""
        self.scores[members] = scores
        entries = [{"members": list(m), "scores": dict(s)} for m, s in self.scores.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("w", encoding="utf-8") as stream:
            json.dump({"subject": self.subject, "scores": entries}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self.path)
