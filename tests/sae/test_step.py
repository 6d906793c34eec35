"""The training step: what one step does, the same on a mesh, in a sweep, and with each piece switched off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mergelab.errors import MeshError, SAEError
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.training.initialize import initialize
from mergelab.sae.training.state import TrainState, place_batch, place_state
from mergelab.sae.training.step import make_step
from mergelab.sae.training.update import averaged_params
from mergelab.sae.variants import Variant, make_variant
from mergelab.sharding import make_mesh
from tests.slow import slow_except

D, N, BATCH = 16, 64, 32
RECIPE = TrainingRecipe(steps=20, batch_size=BATCH, learning_rate=3e-3, dead_after_tokens=2 * BATCH, aux_k=4)
CASES = {
    "topk": {"k": 4},
    "multi_topk": {"k": 3},
    "batch_topk": {"k": 4},
    "jump_relu": {"l0": 4.0},
    "gated": {},
    "relu": {},
    "matryoshka": {"k": 4},
    "abs_topk": {"k": 4},
    "group_max": {"k": 4},
}


def _batches(count: int, width: int = D) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((24, width))
    codes = rng.random((count, BATCH, 24)) * (rng.random((count, BATCH, 24)) < 0.15)
    return list((codes @ truth + 0.5).astype(np.float32))


def _start(variant: Variant, recipe: TrainingRecipe = RECIPE, seed: int = 0) -> TrainState:
    sample = np.concatenate(_batches(8, variant.d_in))
    target = np.concatenate(_batches(8, variant.width_out)) if variant.d_out else None
    return initialize(variant, recipe, jax.random.key(seed), sample, target)


Log = list[dict[str, float]]


def _run(variant: Variant, recipe: TrainingRecipe, steps: int, mesh: Any = None) -> tuple[TrainState, Log]:
    state, step, log = _start(variant, recipe), make_step(variant, recipe, mesh), []
    if mesh is not None:
        state = place_state(state, mesh)
    for x, y in zip(_batches(steps, variant.d_in), _batches(steps, variant.width_out), strict=True):
        x, y = (place_batch(b, mesh) if mesh is not None else jnp.asarray(b) for b in (x, y))
        state, metrics = step(state, x, y)
        log.append({name: float(value) for name, value in metrics.items()})
    return state, log


@pytest.mark.parametrize("name", CASES)
def test_every_variant_learns(name: str) -> None:
    variant = make_variant(name, d_in=D, n_latents=N, **CASES[name])
    state, log = _run(variant, replace(RECIPE, steps=150, learning_rate=None), 150)
    assert all(np.isfinite(list(entry.values())).all() for entry in log)
    assert log[-1]["nmse"] < 0.6 * log[0]["nmse"]
    assert int(state.step) == 150


@pytest.mark.parametrize(
    ("name", "sizes"),
    slow_except(
        [("topk", {"data": 2, "latents": 4}), ("batch_topk", {"data": 2, "latents": 4})],
        [
            ("topk", {"latents": 8}),
            ("topk", {"data": 8}),
            *((name, {"data": 2, "latents": 4}) for name in CASES),
        ],
    ),
)
def test_a_mesh_changes_nothing(name: str, sizes: dict[str, int]) -> None:
    variant = make_variant(name, d_in=D, n_latents=N, **CASES[name])
    alone, log = _run(variant, RECIPE, 8)
    spread, sharded_log = _run(variant, RECIPE, 8, make_mesh(sizes))
    for mine, theirs in zip(log, sharded_log, strict=True):
        for key in mine:
            np.testing.assert_allclose(theirs[key], mine[key], rtol=2e-4, atol=1e-5, err_msg=key)
    assert name not in ("topk", "multi_topk") or log[-1]["auxiliary"] > 0  # dead latents take part
    for key, value in alone.params.items():
        np.testing.assert_allclose(spread.params[key], value, rtol=1e-3, atol=2e-4, err_msg=key)
    np.testing.assert_array_equal(spread.steps_since_fired, alone.steps_since_fired)


def test_a_transcoder_on_a_mesh_changes_nothing() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, d_out=8, skip=True, k=4)
    alone, _ = _run(variant, RECIPE, 8)
    spread, _ = _run(variant, RECIPE, 8, make_mesh({"data": 2, "latents": 4}))
    for key, value in alone.params.items():
        np.testing.assert_allclose(spread.params[key], value, rtol=1e-3, atol=2e-4, err_msg=key)


def test_a_transcoder_learns_a_layer() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, d_out=8, k=4)
    recipe = replace(RECIPE, steps=300, learning_rate=None)
    layer = np.random.default_rng(1).standard_normal((D, 8)).astype(np.float32)
    pairs = [(x, np.maximum(x @ layer, 0)) for x in _batches(recipe.steps)]
    sample = map(np.concatenate, zip(*pairs[:8], strict=True))
    state, step, log = initialize(variant, recipe, jax.random.key(0), *sample), make_step(variant, recipe), []
    for x, y in pairs:
        state, metrics = step(state, jnp.asarray(x), jnp.asarray(y))
        log.append(float(metrics["nmse"]))
    assert np.mean(log[-20:]) < 0.25


@pytest.mark.parametrize("sizes", slow_except([None], [None, {"data": 2, "latents": 4}]), ids=str)
def test_a_sweep_is_the_trainings_one_by_one(sizes: dict[str, int] | None) -> None:
    wide = make_variant("topk", d_in=D, n_latents=N, k=6)
    recipe = replace(RECIPE, initial_scale=0.5)  # else it would follow the variant's k
    members = [(1e-3, 6, N), (3e-3, 4, N), (3e-3, 4, 48)]
    starts = [
        replace(
            _start(wide, replace(recipe, learning_rate=rate)),
            sweep_member={"k": jnp.int32(k), "n_latents": jnp.int32(n)},
        )
        for rate, k, n in members
    ]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    mesh = None if sizes is None else make_mesh(sizes)
    state = state if mesh is None else place_state(state, mesh)
    step = make_step(wide, recipe, mesh, sweep=True)
    log: dict[str, Any] = {}
    for x in _batches(8):
        batch = jnp.asarray(x) if mesh is None else place_batch(x, mesh)
        state, log = step(state, batch, batch)
    for i, (rate, k, n) in enumerate(members):
        if n != N:
            continue
        one = replace(recipe, learning_rate=rate)
        alone, mine = _run(make_variant("topk", d_in=D, n_latents=N, k=k), one, 8)
        for key, value in alone.params.items():
            np.testing.assert_allclose(state.params[key][i], value, rtol=1e-3, atol=2e-4, err_msg=key)
        np.testing.assert_allclose(log["nmse"][i], mine[-1]["nmse"], rtol=1e-4)
    # Latents beyond the member's number never fire and never move.
    np.testing.assert_array_equal(state.params["encoder"][2, 48:], starts[2].params["encoder"][48:])
    assert (np.asarray(state.steps_since_fired[2, 48:]) == 8).all()


def test_the_decoder_stays_on_the_sphere_unless_told_otherwise() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    kept, _ = _run(variant, RECIPE, 10)
    np.testing.assert_allclose(np.linalg.norm(kept.params["decoder"], axis=1), 1, atol=1e-5)
    free, _ = _run(variant, replace(RECIPE, unit_decoder=False), 10)
    assert np.abs(np.linalg.norm(free.params["decoder"], axis=1) - 1).max() > 1e-3


def test_the_average_follows_its_formula() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    recipe = replace(RECIPE, ema=0.9)
    weights = 0.1 * 0.9 ** np.arange(4, -1, -1)
    state, step, snapshots = _start(variant, recipe), make_step(variant, recipe), []
    for x in _batches(5):
        state, _ = step(state, jnp.asarray(x), jnp.asarray(x))
        snapshots.append(np.array(state.params["encoder"]))
    wanted = np.tensordot(weights, np.stack(snapshots), 1) / weights.sum()
    np.testing.assert_allclose(averaged_params(state, recipe.ema_decay)["encoder"], wanted, atol=1e-5)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    # With Adam only the ratio of steps shows clipping: a first huge batch would weigh on the moments.
    free, log = _run(variant, RECIPE, 1)
    bound = log[0]["grad_norm"] / 10
    clipped, _ = _run(variant, replace(RECIPE, clip=bound), 1)
    np.testing.assert_allclose(clipped.mean["encoder"], np.asarray(free.mean["encoder"]) / 10, rtol=1e-4)


def test_counters_of_dead_latents() -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    state, _ = _run(variant, RECIPE, 3)
    since = np.asarray(state.steps_since_fired)
    assert set(np.unique(since)) <= {0, 1, 2, 3} and (since == 0).any()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "latents": 4}], ids=str)
@pytest.mark.parametrize("boost", [0.0, 3.0])
def test_the_bias_of_a_latent_that_does_not_fire_rises(boost: float, mesh: dict[str, int] | None) -> None:
    recipe = replace(
        RECIPE, aux_k=0, bias_boost=boost, dead_after_tokens=16 * 2 * BATCH, warmup=0.0, decay=0.0
    )
    assert recipe.boost_after == 2 * BATCH
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    start = _start(variant, recipe)
    far = N - 1
    bias = start.params["encoder_bias"].at[far].set(-100.0)
    state = replace(start, params={**start.params, "encoder_bias": bias})
    laid = None if mesh is None else make_mesh(mesh)
    state = state if laid is None else place_state(state, laid)
    step = make_step(variant, recipe, laid)
    for x in _batches(6):
        batch = jnp.asarray(x) if laid is None else place_batch(x, laid)
        state, _ = step(state, batch, batch)
    # Silent for 2 batches after the second step: raised in the second to the sixth.
    raised = np.asarray(state.params["encoder_bias"])[far] + 100
    np.testing.assert_allclose(raised, 5 * boost * 3e-3, rtol=0, atol=2e-5)
    assert np.asarray(state.steps_since_fired)[far] == 6


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_lift_does_not_fade_below_its_floor(floor: float) -> None:
    recipe = replace(RECIPE, steps=4, warmup=0.0, decay=1.0, aux_k=0, dead_after_tokens=1)
    recipe = replace(recipe, bias_boost=3.0, boost_floor=floor)
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    start = _start(variant, recipe)
    bias = start.params["encoder_bias"].at[-1].set(-100.0)
    state, step = replace(start, params={**start.params, "encoder_bias": bias}), make_step(variant, recipe)
    for x in _batches(4):
        state, _ = step(state, jnp.asarray(x), jnp.asarray(x))
    rates = np.maximum([1.0, 0.75, 0.5, 0.25], floor)
    raised = np.asarray(state.params["encoder_bias"])[-1] + 100
    np.testing.assert_allclose(raised, 3 * 3e-3 * rates.sum(), rtol=0, atol=2e-5)


def test_the_average_is_over_a_part_of_a_short_training() -> None:
    assert TrainingRecipe(steps=2500, batch_size=1).ema_decay == pytest.approx(0.98)
    assert TrainingRecipe(steps=10**6, batch_size=1).ema_decay == pytest.approx(0.999)
    assert TrainingRecipe(steps=10, batch_size=1).ema_decay == 0
    assert TrainingRecipe(steps=2500, batch_size=1, ema=0.9).ema_decay == 0.9


@pytest.mark.parametrize("sizes", [{"latents": 8}, {"data": 2, "latents": 4}, {"data": 8}], ids=str)
def test_a_mesh_starts_from_the_same_parameters_each_device_making_its_own(sizes: dict[str, int]) -> None:
    variant = make_variant("topk", d_in=D, n_latents=N, k=4)
    sample = np.random.default_rng(0).standard_normal((64, D), np.float32)
    whole = initialize(variant, RECIPE, jax.random.key(5), sample)
    parted = initialize(variant, RECIPE, jax.random.key(5), sample, mesh=make_mesh(sizes))
    assert jax.tree.structure(parted) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parted), strict=True):
        np.testing.assert_allclose(other, np.asarray(one), rtol=0, atol=1e-7)
    rows = {shard.data.shape[0] for shard in parted.params["encoder"].addressable_shards}
    assert rows == {N // sizes.get("latents", 1)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 65}, "n_latents=64"),
        ({"kk": 3}, "did you mean 'k'"),
        ({"k": 4, "skip": True}, "give d_out"),
        ({"k": 4, "sites": 3}, "d_in=16"),
        ({"k": 4, "half_weight": -1.0}, "half_weight is -1.0"),
        ({"k": 4, "half_from": 1.5}, "half_from is 1.5"),
    ],
)
def test_impossible_variants_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SAEError, match=words):
        make_variant("topk", d_in=D, n_latents=N, **options)


def test_unknown_variants_and_meshes_are_refused() -> None:
    with pytest.raises(SAEError, match="did you mean 'topk'"):
        make_variant("topkk", d_in=4, n_latents=8)
    variant = make_variant("topk", d_in=D, n_latents=60, k=4)
    with pytest.raises(MeshError, match="60 latents"):
        place_state(_start(variant), make_mesh({"latents": 8}))
    with pytest.raises(MeshError, match="'tensor'"):
        make_step(variant, RECIPE, make_mesh({"tensor": 8}))


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (np.zeros((4, D), np.float32), "does not vary"),
        (np.ones((4, D + 1), np.float32), "expected \\[rows, 16\\]"),
        (np.full((4, D), np.nan, np.float32), "NaN"),
    ],
)
def test_bad_samples_are_refused(sample: np.ndarray, words: str) -> None:
    with pytest.raises(SAEError, match=words):
        initialize(make_variant("topk", d_in=D, n_latents=N, k=4), RECIPE, jax.random.key(0), sample)
