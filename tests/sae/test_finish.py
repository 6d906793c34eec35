"""A finished SAE makes of raw activations what the training made of normalized ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import SAEError
from mergelab.sae.normalizations import layer_norm
from mergelab.sae.sae import SAE, SAEConfig
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.finish import finished_sae
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.step import make_step
from mergelab.sae.variants import Context, make_variant
from tests.slow import slow_except

D, N, BATCH = 12, 48, 64
CASES: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"k": 4}),
    ("topk", {"k": 4, "d_out": 7, "skip": True}),
    ("multi_topk", {"k": 4}),
    ("batch_topk", {"k": 4}),
    ("jump_relu", {"l0": 4.0}),
    ("gated", {}),
    ("relu", {"l1": 0.1}),
    ("matryoshka", {"k": 4}),
    ("abs_topk", {"k": 4}),
    ("topk", {"k": 4, "sites": 3}),
    ("topk", {"k": 4, "normalize": "none"}),
    ("topk", {"k": 4, "normalize": "layer_norm"}),
    ("group_max", {"k": 4}),
]


@pytest.mark.parametrize(("name", "options"), slow_except([*CASES[1:8:2], *CASES[8::2]], CASES))
def test_raw_inputs_give_the_trained_reconstruction(name: str, options: dict[str, Any]) -> None:
    options = dict(options)
    ema = 0.0 if name == "batch_topk" else 0.9
    normalize = options.pop("normalize", "scale")
    variant = make_variant(name, d_in=D, n_latents=N, **options)
    recipe = TrainingRecipe(steps=12, batch_size=BATCH, learning_rate=1e-2, ema=ema, normalize=normalize)
    rng = np.random.default_rng(0)
    x = (5 + 3 * rng.standard_normal((BATCH, D))).astype(np.float32)
    y = (2 - 0.2 * rng.standard_normal((BATCH, variant.width_out))).astype(np.float32)
    y = x if variant.d_out is None else y
    state = initialize(variant, recipe, jax.random.key(0), x, y)
    step = make_step(variant, recipe)
    for _ in range(12):
        state, _ = step(state, jnp.asarray(x), jnp.asarray(y))
    sae = finished_sae(variant, recipe, state)
    params = state.params if not ema else {k: v / (1 - ema**12) for k, v in state.average.items()}
    context = Context(BATCH, state.mse_scale, jnp.float32(1), state.statistics)
    read, mean, scale = jnp.asarray(x), 0.0, 1.0
    if normalize == "layer_norm":
        read, mean, scale = layer_norm(read)
    target = state.target(read if variant.d_out is None else jnp.asarray(y))
    _, outcome = variant.loss(params, state.read(read), target, context)
    made = (target - outcome.error) / state.target.scale + state.target.mean[None, :]
    made = made * scale + mean
    if sae.config.activation == "batch_topk":
        # Its threshold is a running mean over batches; with this batch's the codes are this batch's.
        kept = np.asarray(getattr(outcome.codes, "values"))  # noqa: B009
        least = kept[kept > 0].min() * (1 - 1e-6) / float(state.read.scale)
        assert 0.2 < least / float(np.asarray(sae.threshold)[0]) < 5
        sae = replace(sae, threshold=jnp.full(N, least, jnp.float32))
    mine = np.asarray(sae(jnp.asarray(x)))
    np.testing.assert_allclose(mine, made, atol=2e-4)
    assert np.abs(mine - mine[0]).max() > 1e-2  # it depends on the input


def test_a_top_k_sae_in_pairs_is_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((D, N), (N,), (N, D), (D,))]
    sae = SAE(*arrays, config=SAEConfig(k=5, subtract_b_dec=True)).checked()
    x = jnp.asarray(rng.standard_normal((9, D)), jnp.float32)
    values, indices = sae.sparse_codes(x)
    codes = sae.encode(x)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(codes), np.asarray(indices), 1), values)
    np.testing.assert_allclose(sae.decode_sparse(values, indices), sae(x), atol=1e-5)
    normal = replace(sae, config=replace(sae.config, normalization="layer_norm"))
    mean = np.asarray(x).mean(axis=1, keepdims=True)
    scale = np.asarray(x).std(axis=1, keepdims=True, ddof=1) + 1e-5
    wanted = np.asarray(sae((x - mean) / scale)) * scale + mean
    np.testing.assert_allclose(normal(x), wanted, atol=2e-5)


def test_saes_that_do_not_fit_are_refused() -> None:
    shapes = {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    arrays: dict[str, Any] = {name: jnp.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(SAEError, match="b_enc has shape \\[7\\]"):
        SAE(**{**arrays, "b_enc": jnp.ones(7)}, config=SAEConfig(k=2)).checked()
    with pytest.raises(SAEError, match="needs threshold"):
        SAE(**arrays, config=SAEConfig("jump_relu")).checked()
    with pytest.raises(SAEError, match="only 8 latents"):
        SAE(**arrays, config=SAEConfig(k=9)).checked()
    with pytest.raises(SAEError, match="needs k"):
        SAEConfig("topk")
