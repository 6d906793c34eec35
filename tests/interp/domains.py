"""Text of two domains that share some words, and a small transformer trained on it.

A line is of domain 0 or 1. Tokens 2 to 11 are words of domain 0, 12 to 21 of domain 1, 22 to 27 are shared
and come up in both equally: after them only what was said before tells which domain goes on. 0 begins a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from mergelab.models.model import Model, Params
from mergelab.quickstart import small_llama
from mergelab.quickstart.train import TrainSettings, train_lm

VOCAB, LENGTH = 28, 16
OWN = (np.arange(2, 12), np.arange(12, 22))
SHARED = np.arange(22, 28)


@dataclass(frozen=True)
class Trained:
    """A trained model."""

    model: Model
    params: Params
    loss: float


def lines(domain: int, count: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """int32 `[count, length]`: 0, a word of the domain, then words of it and shared ones in equal parts."""
    rng = np.random.default_rng([seed, domain])
    own, shared = rng.choice(OWN[domain], (count, length)), rng.choice(SHARED, (count, length))
    text = np.where(rng.random((count, length)) < 0.5, own, shared)
    text[:, 0], text[:, 1] = 0, own[:, 1]
    return text.astype(np.int32)


def neutral(count: int, length: int = 4, seed: int = 0) -> np.ndarray:
    """Prompts of shared words alone."""
    text = np.random.default_rng(seed).choice(SHARED, (count, length))
    text[:, 0] = 0
    return text.astype(np.int32)


def windows(batch: int) -> Iterator[np.ndarray]:
    """Half of each domain; a quarter of the lines begin without a word of their own."""
    seed = 0
    while True:
        seed += 1
        both = np.concatenate([lines(d, batch // 2, LENGTH + 1, seed) for d in (0, 1)])
        both[::4, 1] = np.random.default_rng(seed).choice(SHARED, len(both[::4]))
        yield both


def train_domains() -> Trained:
    """Two layers of width 32; knows the domain of a line from its words."""
    config = small_llama.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    settings = TrainSettings(steps=150, learning_rate=1e-2, warmup_steps=10)
    start = small_llama.init(config, 0)
    params, losses = train_lm(partial(small_llama.apply, config), start, windows(32), settings)
    return Trained(config.model, params, float(losses[-10:].mean()))


def share_of(domain: int, tokens: np.ndarray) -> float:
    """Of the words that belong to a domain, the part that belongs to this one."""
    ours, theirs = (np.isin(tokens, OWN[d]).sum() for d in (domain, 1 - domain))
    return float(ours / max(ours + theirs, 1))
