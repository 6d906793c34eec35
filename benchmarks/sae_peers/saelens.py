"""SAELens (sae-lens 6.54.12): its `SAETrainer` with a `TopKTrainingSAE`, both at their defaults."""

from __future__ import annotations

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

from benchmarks.sae_peers.problem import Arrays, Problem

__all__ = ["build"]


def build(name: str, problem: Problem, sample: np.ndarray) -> SAELens:
    """Builds it; the library looks at no sample."""
    return SAELens(problem)


class SAELens:
    """One training."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(problem.seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=problem.d, d_sae=problem.n, k=problem.k))
        rate = problem.learning_rate or SAETrainerConfig.lr
        config = SAETrainerConfig(
            total_training_samples=problem.steps * problem.batch,
            train_batch_size_samples=problem.batch,
            lr=rate,
            lr_end=rate / 10,  # as its runner sets it; the default schedule is constant and does not use it
        )
        self.learning_rate = config.lr
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))
        self.silent = 0

    def silence(self, count: int) -> None:
        self.silent = count
        self.trainer.sae.b_enc.data[:count] = -100.0

    def step(self, x: np.ndarray) -> None:
        self.trainer.n_forward_passes_since_fired[: self.silent] = 1e9
        self.trainer.step(torch.from_numpy(x))
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.trainer.sae(torch.from_numpy(x)).numpy()

    def arrays(self) -> Arrays:
        sae = self.trainer.sae
        # It selects by pre-activation times decoder norm; the same with the norms folded in.
        norm = sae.W_dec.detach().norm(dim=1)
        return {
            "W_enc": (sae.W_enc.detach() * norm).numpy().copy(),
            "b_enc": (sae.b_enc.detach() * norm).numpy().copy(),
            "W_dec": (sae.W_dec.detach() / norm[:, None]).numpy().copy(),
            "b_dec": sae.b_dec.detach().numpy().copy(),
        }

    def save(self, folder: str) -> None:
        self.trainer.sae.save_inference_model(folder)
