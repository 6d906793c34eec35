"""SAEs of random arrays: enough for what an edit does, nothing about quality."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mergelab.sae.sae import SAE, SAEConfig


def random_sae(
    width: int, latents: int = 48, *, activation: str = "topk", normalization: str = "none"
) -> SAE:
    rng = np.random.default_rng(width)

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)

    config = SAEConfig(
        activation=activation, k=6 if activation == "topk" else None, subtract_b_dec=True,
        normalization=normalization,
    )  # fmt: skip
    threshold = jnp.full(latents, 0.3) if activation == "jump_relu" else None
    return SAE(
        normal(width, latents), normal(latents), normal(latents, width), normal(width), config, threshold
    ).checked()
