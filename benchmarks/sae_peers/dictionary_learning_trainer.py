"""dictionary_learning (0.1.0): its `TopKTrainer` at its defaults."""

from __future__ import annotations

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.sae_peers.problem import Arrays, Problem

__all__ = ["build"]


def build(name: str, problem: Problem, sample: np.ndarray) -> DictionaryLearning:
    """Builds it; the library starts from its first batch."""
    return DictionaryLearning(problem)


class DictionaryLearning:
    """One training."""

    def __init__(self, problem: Problem) -> None:
        self.trainer = TopKTrainer(
            steps=problem.steps,
            activation_dim=problem.d,
            dict_size=problem.n,
            k=problem.k,
            layer=0,
            lm_name="none",
            lr=problem.learning_rate,
            # Its default of 1000 must be less than the number of steps.
            warmup_steps=min(1000, problem.steps - 1),
            seed=problem.seed,
            device="cpu",
        )
        self.learning_rate = self.trainer.lr
        self.silent = 0
        self.done = 0

    def silence(self, count: int) -> None:
        self.silent = count
        self.trainer.ae.encoder.bias.data[:count] = -100.0

    def step(self, x: np.ndarray) -> None:
        self.trainer.num_tokens_since_fired[: self.silent] = 2**40
        self.trainer.update(self.done, torch.from_numpy(x))
        self.done += 1

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.trainer.ae(torch.from_numpy(x)).numpy()

    def arrays(self) -> Arrays:
        ae = self.trainer.ae
        return {
            "W_enc": ae.encoder.weight.detach().T.numpy().copy(),
            "b_enc": ae.encoder.bias.detach().numpy().copy(),
            "W_dec": ae.decoder.weight.detach().T.numpy().copy(),
            "b_dec": ae.b_dec.detach().numpy().copy(),
        }
