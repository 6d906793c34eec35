"""EleutherAI's sparsify (eai-sparsify 1.3.3), stepped as its `Trainer.fit` does with one layer, no model.

`sparsify+Adam` is its `optimizer="adam"` (warm-up over 1000 steps, then linear decay); `sparsify` its
default, sign descent with a schedule-free average. Its AuxK is off unless asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig  # pyright: ignore[reportMissingImports]
from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
from transformers import get_linear_schedule_with_warmup  # pyright: ignore[reportMissingImports]

from benchmarks.sae_peers.problem import Arrays, Problem

__all__ = ["build"]

_AUXILIARY_WEIGHT = 1 / 32


def build(name: str, problem: Problem, sample: np.ndarray) -> Sparsify:
    """Builds it; the sample is not looked at, as the library starts from its first batch."""
    return Sparsify(problem, adam=name == "sparsify+Adam")


class Sparsify:
    """One training."""

    def __init__(self, problem: Problem, *, adam: bool) -> None:
        torch.manual_seed(problem.seed)
        self.config = TrainConfig(
            SparseCoderConfig(num_latents=problem.n, k=problem.k),
            optimizer="adam" if adam else "signum",
            auxk_alpha=_AUXILIARY_WEIGHT if problem.auxiliary else 0.0,
        )
        self.sae = SparseCoder(problem.d, self.config.sae, dtype=torch.float32)
        base = 2e-4 if adam else 5e-3
        self.learning_rate = problem.learning_rate or base / (problem.n / 2**14) ** 0.5
        groups = [{"params": self.sae.parameters(), "lr": self.learning_rate}]
        self.scheduler = None
        self.averaging = None
        if adam:
            self.optimizer = torch.optim.Adam(groups)
            warmup = self.config.lr_warmup_steps
            self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, problem.steps)
        else:
            self.optimizer = self.averaging = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
            self.averaging.train()
        self.quiet = torch.zeros(problem.n, dtype=torch.long)
        self.silent = 0
        self.started = False

    def silence(self, count: int) -> None:
        self.silent = count
        self.sae.encoder.bias.data[:count] = -100.0

    def step(self, x: np.ndarray) -> None:
        batch = torch.from_numpy(x)
        if not self.started:
            self.sae.b_dec.data = batch.mean(0)
            self.started = True
        self.quiet[: self.silent] = 2**40
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.quiet > self.config.dead_feature_threshold if self.config.auxk_alpha > 0 else None
        variance = (batch - batch.mean(0)).pow(2).sum()
        out = self.sae(x=batch, y=batch, dead_mask=dead, total_variance=variance)
        (out.fvu + self.config.auxk_alpha * out.auxk_loss).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        with torch.no_grad():
            self.quiet += len(batch)
            self.quiet[out.latent_indices.flatten()] = 0

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        with torch.no_grad(), self._averaged():
            return self.sae(torch.from_numpy(x)).sae_out.numpy()

    def arrays(self) -> Arrays:
        with self._averaged():
            return {
                "W_enc": self.sae.encoder.weight.detach().T.numpy().copy(),
                "b_enc": self.sae.encoder.bias.detach().numpy().copy(),
                "W_dec": self.sae.W_dec.detach().numpy().copy(),
                "b_dec": self.sae.b_dec.detach().numpy().copy(),
            }

    def save(self, folder: str) -> None:
        with self._averaged():
            self.sae.save_to_disk(folder)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The parameters are those that would be saved: the schedule-free average, where there is one."""
        if self.averaging is None or not self.started:
            yield
            return
        self.averaging.eval()
        yield
        self.averaging.train()
