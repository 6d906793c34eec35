"""Evaluators of a candidate: a user's program, or bits per byte of a text."""

from __future__ import annotations

import hashlib
import math
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergelab.activations.losses import summed_loss
from mergelab.checkpoints.companions import has_companion
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.json_data import parse_json
from mergelab.checkpoints.model_files import open_tokenizer_file
from mergelab.checkpoints.text_file import MAX_PROSE, read_text
from mergelab.errors import CheckpointError, EvaluationError
from mergelab.models.load import load_model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.text.packing import evaluation_windows

__all__ = ["METRIC", "CommandEvaluator", "TextLoss"]


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


METRIC = "bits_per_byte"
_LENGTH = 512


@dataclass(frozen=True)
class TextLoss:
    """Scores a folder with a causal model by its loss on a text: bits per UTF-8 byte, lower is better.

    Bits per byte do not depend on the tokenizer, so models with different vocabularies compare.

    Attributes:
        text: the file, read as one document.
        length: tokens per window, at most what the model was made for; a window begins afresh. If None, 512,
            or as many as the model was made for.
        batch: windows per forward pass.

    Raises:
        EvaluationError: the text cannot be read or is empty.
    """

    text: Path
    length: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        self._read()

    @property
    def subject(self) -> str:
        """Says what the scores are of, for the journal of an interrupted run."""
        digest = hashlib.sha256(self._read().encode()).hexdigest()
        return f"bits per byte of a text with SHA-256 {digest}, windows of {self.length or _LENGTH}"

    def __call__(self, folder: Path) -> dict[str, float]:
        """Returns `{"bits_per_byte": loss}` for the model in `folder`.

        Raises:
            CheckpointError: the folder holds no causal model of a supported family, or no `tokenizer.json`.
            TokenError: `length` is more than its positions, or its tokenizer has tokens it lacks.
        """
        text = self._read()
        tokens = _tokenize(folder, text)
        model, params = load_model(folder, dtype=np.float32)
        if not model.predicts:
            raise CheckpointError(
                f"{folder} holds a {model.family.model_type!r} model, which predicts no next token; score it "
                "with a command of your own."
            )
        place = str(folder / "tokenizer.json")
        check_tokens(model, np.asarray(tokens)[:, None], place=place)
        length = window_length(model, self.length, _LENGTH, place=f"{folder}, windows of text")
        windows = evaluation_windows([tokens], _separator(folder), length, len(text.encode()))
        nats = summed_loss(model, params, windows.tokens, windows.is_target, batch=self.batch)
        return {METRIC: nats / math.log(2) / windows.num_bytes}

    def _read(self) -> str:
        text = read_text(self.text, MAX_PROSE, error=EvaluationError)
        if not text.strip():
            raise EvaluationError(f"The text {self.text} is empty; a loss needs some text.")
        return text


def _tokenize(folder: Path, text: str) -> list[int]:
    path = folder / "tokenizer.json"
    if not has_companion(folder, path.name):
        raise CheckpointError(
            f"{folder} has no tokenizer.json; the loss on a text needs the model's tokenizer."
        )
    return open_tokenizer_file(path).encode(text, add_special_tokens=False).ids


def _separator(folder: Path) -> int:
    """The token a window that begins the text sees before it: bos, or eos, or else token 0."""
    config = open_checkpoint(folder).config
    for name in ("bos_token_id", "eos_token_id"):
        found = config.get(name)
        if found is not None:
            first = found[0] if isinstance(found, list) and found else found
            if type(first) is int and 0 <= first < 2**31:
                return first
    return 0
