"""Cuts token streams into fixed-length windows: random ones to train on, disjoint ones to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["EvaluationWindows", "evaluation_windows", "random_windows", "token_stream"]


def token_stream(documents: Sequence[Sequence[int]], separator: int) -> np.ndarray:
    """Joins tokenised documents into one int32 stream, `separator` before each and after the last."""
    joined = [np.array([separator, *document], np.int32) for document in documents]
    return np.concatenate([*joined, np.array([separator], np.int32)])


def random_windows(stream: np.ndarray, length: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless int32 batches `[batch, length + 1]` of windows drawn uniformly from the stream."""
    starts = np.random.default_rng(seed)
    offsets = np.arange(length + 1)
    while True:
        yield stream[starts.integers(0, len(stream) - length, size=(batch, 1)) + offsets]


@dataclass(frozen=True)
class EvaluationWindows:
    """Disjoint windows that cover a text: every token is a target exactly once.

    Attributes:
        tokens: int32 `[windows, length + 1]`; column 0 is context only, the rest are targets.
        is_target: bool `[windows, length]`, False on padding.
        num_bytes: UTF-8 bytes of the text the targets spell.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    num_bytes: int


def evaluation_windows(
    documents: Sequence[Sequence[int]], separator: int, length: int, num_bytes: int
) -> EvaluationWindows:
    """Windows over documents, each begun afresh: a window sees `separator` or the token before it, no more.

    The separator is never a target, so the targets are exactly the documents' tokens.
    """
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for document in documents:
        stream = np.array([separator, *document], np.int32)
        for start in range(0, len(document), length):
            window = stream[start : start + length + 1]
            padding = length + 1 - len(window)
            rows.append(np.pad(window, (0, padding), constant_values=separator))
            masks.append(np.arange(length) < len(window) - 1)
    return EvaluationWindows(np.stack(rows), np.stack(masks), num_bytes)
