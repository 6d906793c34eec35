"""An evaluator that needs no program: bits per byte of a causal language model on a text file."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergelab.activations.losses import summed_loss
from mergelab.checkpoints.folder import open_checkpoint
from mergelab.checkpoints.model_files import open_tokenizer_file
from mergelab.checkpoints.text_file import MAX_PROSE, read_text
from mergelab.errors import CheckpointError, EvaluationError
from mergelab.models.load import load_model
from mergelab.models.token_checks import check_tokens, window_length
from mergelab.text.packing import evaluation_windows

__all__ = ["METRIC", "TextLoss"]

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
        if not model.family.architecture.causal:
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
    if not path.is_file():
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
