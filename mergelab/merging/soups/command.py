"""An evaluator that runs the user's own program on a model folder and reads the scores it prints."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.checkpoints.json_data import parse_json
from mergelab.errors import CheckpointError, EvaluationError

__all__ = ["CommandEvaluator"]

_TAIL = 800  # characters of stderr that an error message repeats


@dataclass(frozen=True)
class CommandEvaluator:
    """Runs a command with the model's folder in place of `{model}`; no shell is involved.

    The last line of its standard output must be a number, or a JSON object of numbers by metric name.

    Attributes:
        command: the command line, split as a POSIX shell would; `{model}` stands for the folder.
        timeout: seconds one evaluation may take; None: any.

    Raises:
        EvaluationError: the command cannot be split, has no `{model}`, or names no program.
    """

    command: str
    timeout: float | None = None

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise EvaluationError(f"The command {self.command!r} cannot be split: {error}.") from error
        if not any("{model}" in word for word in words):
            raise EvaluationError(
                f"The command {self.command!r} has no {{model}}; write it where the model's folder belongs."
            )

        if "{model}" not in words[0] and shutil.which(words[0]) is None:
            raise EvaluationError(f"The command {self.command!r} cannot be run: there is no {words[0]!r}.")

    @property
    def subject(self) -> str:
        """Says what the scores are of, for the journal of an interrupted run."""
        return self.command

    def __call__(self, folder: Path) -> Any:
        """Returns what the command printed for this folder.

        Raises:
            EvaluationError: the command could not be run, failed, ran out of time or printed no scores.
        """
        words = [word.replace("{model}", str(folder)) for word in shlex.split(self.command)]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=self.timeout, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(f"{shlex.join(words)} took longer than {self.timeout:g} s.") from error
        except OSError as error:
            raise EvaluationError(f"{words[0]} cannot be run ({error.strerror}).") from error
        if done.returncode != 0:
            raise EvaluationError(
                f"{shlex.join(words)} exited with status {done.returncode}; its last words: "
                f"{done.stderr.strip()[-_TAIL:] or '(nothing on standard error)'}"
            )
        return _parse(done.stdout, words)


def _parse(output: str, words: list[str]) -> Any:
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    try:
        scores = parse_json(last.encode(), "the last line")
    except CheckpointError:
        scores = None
    if isinstance(scores, bool) or not isinstance(scores, dict | int | float):
        raise EvaluationError(
            f"{shlex.join(words)} printed {last[:80]!r} as its last line; expected a number or a JSON object "
            'of numbers, such as {"accuracy": 0.91}.'
        )
    return scores
