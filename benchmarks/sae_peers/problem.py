"""What every trainer of the SAE benchmarks is given, what it must offer, and how it is built by name.

A trainer's module is imported only when it is built: each needs a library of its own.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["TRAINERS", "Arrays", "Problem", "Trainer", "build", "decode", "encode"]

Arrays = dict[str, np.ndarray]
"""`W_enc [d, n]`, `b_enc [n]`, `W_dec [n, d]`, `b_dec [d]`: codes are those of the k largest of
`(x - b_dec) W_enc + b_enc` that are above 0."""

TRAINERS = {
    "mergelab": "ours",
    "mergelab bfloat16": "ours",
    "frozen decoder": "ours",
    "random": "ours",
    "sparsify+Adam": "eleuther",
    "sparsify": "eleuther",
    "SAELens": "saelens",
    "dictionary_learning": "dictionary_learning_trainer",
}
"""Trainers by the name tables give them, and the module of this folder that builds them."""


@dataclass(frozen=True)
class Problem:
    """One training.

    Attributes:
        d: width of the activations.
        n: latents.
        k: latents per token.
        batch: tokens per step.
        steps: steps in all.
        seed: of the initial parameters.
        learning_rate: None is the trainer's default.
        auxiliary: switches AuxK on where it is off by default (sparsify), so that dead latents cost every
            trainer what reviving them costs.
    """

    d: int
    n: int
    k: int
    batch: int
    steps: int
    seed: int = 0
    learning_rate: float | None = None
    auxiliary: bool = False


class Trainer(Protocol):
    """A training that is stepped from outside."""

    learning_rate: float
    """The peak learning rate it runs at."""

    def step(self, x: np.ndarray) -> None:
        """One full training step on `[batch, d]`, float32; it returns when parameters are updated."""
        ...

    def silence(self, count: int) -> None:
        """Makes the first `count` latents dead for good: a bias of -100, counters past all thresholds."""
        ...

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        """Reconstructions of `[rows, d]` by the trainer's own code."""
        ...

    def arrays(self) -> Arrays:
        """The SAE as it would be saved now."""
        ...

    def save(self, folder: str) -> None:
        """Writes the SAE as it is now to a new folder, in the trainer's own format."""
        ...


def encode(arrays: Arrays, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of activations `[rows, d]`: values and indices, both `[rows, k]`."""
    pre = (x - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    indices = np.argpartition(pre, -k, axis=1)[:, -k:]
    return np.maximum(np.take_along_axis(pre, indices, axis=1), 0), indices


def decode(arrays: Arrays, values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Reconstructions `[rows, d]`."""
    codes = np.zeros((len(values), len(arrays["W_dec"])), np.float32)
    np.put_along_axis(codes, indices, values, axis=1)
    return codes @ arrays["W_dec"] + arrays["b_dec"]


def build(name: str, problem: Problem, sample: np.ndarray) -> Trainer:
    """Builds a trainer.

    Args:
        name: of `TRAINERS`.
        problem: what to train.
        sample: `[rows, d]` activations for an initialization that looks at data; the peers use their first
            batch instead.
    """
    module = importlib.import_module(f"benchmarks.sae_peers.{TRAINERS[name]}")
    return module.build(name, problem, sample)
