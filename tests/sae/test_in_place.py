"""Changing arrays where they lie: the same values as plainly computed, and no copies in the compiled step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.sae.kernels.collectives import Shards
from mergelab.sae.kernels.rows import update_rows
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.step import make_step, train_step
from mergelab.sae.variants import make_variant
from tests.compilation import TEXT_AS_USERS


@pytest.mark.parametrize("n", [5, 4096, 8192, 9001])
def test_rows_in_blocks_are_rows_at_once(n: int) -> None:
    a, b, c = np.random.default_rng(n).standard_normal((3, n, 64)).astype(np.float32)

    def function(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        return a / jnp.abs(a).max(axis=1, keepdims=True) + c, b * c

    found = jax.jit(lambda a, b, c: update_rows(function, (a, b), (c,), jnp.abs(a).max(), Shards()))(a, b, c)
    np.testing.assert_allclose(found[0], a / np.abs(a).max(axis=1, keepdims=True) + c, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], b * c, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_step_copies_no_array_of_the_size_of_a_parameter(clip: float | None) -> None:
    d, n, batch = 64, 10_000, 32
    variant = make_variant("topk", d_in=d, n_latents=n, k=4)
    recipe = TrainingRecipe(20, batch, learning_rate=1e-3, clip=clip)
    x = np.random.default_rng(0).standard_normal((batch, d)).astype(np.float32)
    state = initialize(variant, recipe, jax.random.key(0), x)
    lowered = make_step(variant, recipe).lower(state, x, x)  # pyright: ignore[reportFunctionMemberAccess]
    program = lowered.compile(TEXT_AS_USERS)
    lines = [line.strip() for line in program.as_text().splitlines()]
    assert [line for line in lines if f"f32[{n},{d}]" in line.split(" copy(")[0] and " copy(" in line] == []


@pytest.mark.slow
def test_blocks_and_a_choice_of_one_program_are_the_same_step() -> None:
    d, n, batch = 64, 9001, 32  # two blocks of rows, and a rest
    variant = make_variant("topk", d_in=d, n_latents=n, k=4)
    recipe = TrainingRecipe(
        20, batch, learning_rate=1e-3, dead_after_tokens=2 * batch, aux_k=8, clip=0.5, bias_boost=0.0
    )
    x = np.random.default_rng(0).standard_normal((batch, d)).astype(np.float32)
    first = initialize(variant, recipe, jax.random.key(0), x)
    results = []
    for platform in ("cpu", "gpu"):
        step = jax.jit(partial(train_step, variant, recipe, Shards(platform=platform)))
        state = first
        for _ in range(4):
            state, metrics = step(state, x, x)
        assert metrics["auxiliary"] > 0
        results.append((state, metrics))
    (mine, said), (theirs, also) = results
    for group in ("params", "mean", "square", "average"):
        for name, value in getattr(theirs, group).items():
            np.testing.assert_allclose(
                getattr(mine, group)[name], value, rtol=1e-3, atol=1e-6, err_msg=f"{group} {name}"
            )
    for name, value in also.items():
        np.testing.assert_allclose(said[name], value, rtol=1e-4, err_msg=name)
