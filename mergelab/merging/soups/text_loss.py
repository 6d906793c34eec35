"""An evaluator that needs no program: bits per byte of a causal language model on a text file."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mergelab.data.windows import evaluation_windows
from mergelab.errors import CheckpointError, EvaluationError
from mergelab.models import llama

__all__ = ["METRIC", "TextLoss"]

METRIC = "bits_per_byte"


@dataclass(frozen=True)
class TextLoss:
    """Scores a Llama-shaped checkpoint folder by its loss on a text: bits per UTF-8 byte, lower is better.

    Bits per byte do not depend on the tokenizer, so models with different vocabularies compare.

    Attributes:
        text: the file, read as one document.
        length: tokens per window, at most what the model was made for; a window begins afresh.
        batch: windows per forward pass.

    Raises:
        EvaluationError: the text cannot be read or is empty.
    """

    text: Path
    length: int = 512
    batch: int = 8

    def __post_init__(self) -> None:
        self._read()

    @property
    def subject(self) -> str:
        """Says what the scores are of, for the journal of an interrupted run."""
        digest = hashlib.sha256(self._read().encode()).hexdigest()
        return f"bits per byte of a text with SHA-256 {digest}, windows of {self.length}"

    def __call__(self, folder: Path) -> dict[str, float]:
        """Returns `{"bits_per_byte": loss}` for the model in `folder`.

        Raises:
            CheckpointError: the folder is not a Llama checkpoint with a `tokenizer.json`.
        """
        text = self._read()
        config, params = llama.load(folder)
        tokens = _tokenize(folder, text)
        length = min(self.length, config.max_position_embeddings)
        separator = next((t for t in (config.bos_token_id, config.eos_token_id) if t is not None), 0)
        windows = evaluation_windows([tokens], separator, length, len(text.encode()))
        nats = 0.0
        for start in range(0, len(windows.tokens), self.batch):
            rows = slice(start, start + self.batch)
            # Short last batches are filled with rows that count for nothing: one shape, one program.
            missing = ((0, self.batch - len(windows.tokens[rows])), (0, 0))
            nats += float(
                _loss(
                    config,
                    params,
                    np.pad(windows.tokens[rows], missing),
                    np.pad(windows.is_target[rows], missing),
                )
            )
        return {METRIC: nats / math.log(2) / windows.num_bytes}

    def _read(self) -> str:
        try:
            text = Path(self.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"The text {self.text} cannot be read as UTF-8 ({error}).") from error
        if not text.strip():
            raise EvaluationError(f"The text {self.text} is empty; a loss needs some text.")
        return text


def _tokenize(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; the loss on a text needs the model's tokenizer."
        )
    return Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


@partial(jax.jit, static_argnums=0)
def _loss(
    config: llama.LlamaConfig,
    params: llama.Params,
    tokens: Int[Array, "batch length_plus_1"],
    is_target: Array,
) -> Float[Array, ""]:
    """Summed cross-entropy of the target tokens, in nats."""
    logits = llama.apply(config, params, tokens[:, :-1])
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(is_target, chosen, jnp.zeros_like(chosen)))
