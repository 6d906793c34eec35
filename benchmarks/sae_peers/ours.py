"""mergelab's own trainer as the benchmarks see it, and two baselines: a frozen decoder, no training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sae_peers.problem import Arrays, Problem
from mergelab.sae.evaluation.controls import freeze_decoder
from mergelab.sae.formats.detect import save_sae
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.step import make_step
from mergelab.sae.variants import make_variant

__all__ = ["build"]


def build(name: str, problem: Problem, sample: np.ndarray) -> Ours:
    """Builds it from the sample, or from the few rows there are where only time counts."""
    return Ours(name, problem, sample)


_step_of = cache(make_step)


class Ours:
    """One training by `mergelab.sae`; learning rate and precision apart, all settings at their defaults."""

    def __init__(self, name: str, problem: Problem, sample: np.ndarray) -> None:
        self.name = name
        self.variant = make_variant("topk", d_in=problem.d, n_latents=problem.n, k=problem.k)
        self.recipe = TrainingRecipe(
            steps=problem.steps,
            batch_size=problem.batch,
            compute_dtype="bfloat16" if name.endswith("bfloat16") else "float32",
        )
        self.state = initialize(self.variant, self.recipe, jax.random.key(problem.seed), sample)
        if problem.learning_rate is not None:
            # In the state and not the recipe, so that all rates of a process run one program.
            self.state = replace(self.state, peak=jnp.asarray(problem.learning_rate, jnp.float32))
        self.learning_rate = float(self.state.peak)
        self.update = _step_of(self.variant, self.recipe)
        if name == "frozen decoder":
            self.update = freeze_decoder(self.update, self.state, self.recipe.ema_decay)

    def silence(self, count: int) -> None:
        self.state.params["encoder_bias"] = self.state.params["encoder_bias"].at[:count].set(-100.0)
        silent = self.state.steps_since_fired.at[:count].set(2**30)
        self.state = replace(self.state, steps_since_fired=silent)

    def step(self, x: np.ndarray) -> None:
        if self.name == "random":
            return
        batch = jnp.asarray(x)
        self.state, metrics = self.update(self.state, batch, batch)
        metrics["loss"].block_until_ready()

    def reconstruct(self, x: np.ndarray) -> np.ndarray:
        found = finished_sae(self.variant, self.recipe, self.state)
        return np.asarray(found(jnp.asarray(x)))

    def save(self, folder: str) -> None:
        save_sae(finished_sae(self.variant, self.recipe, self.state), folder)

    def arrays(self) -> Arrays:
        found = finished_sae(self.variant, self.recipe, self.state)
        arrays = {name: np.asarray(getattr(found, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if not found.config.subtract_b_dec:
            arrays["b_enc"] = arrays["b_enc"] + arrays["b_dec"] @ arrays["W_enc"]
        return arrays
