"""Merges weighed by statistics of data: RegMean's Gram matrices and Fishers, wherever they are run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mergelab import operators as ops
from mergelab.errors import NonFiniteError, OperatorError
from mergelab.merging.engine import blocks
from mergelab.merging.engine.job import Job
from tests.merging.streaming.test_stream_jobs import ArraySource, jobs_for, streamed
from tests.operators.test_spectral import CASES, Arrays, error, inputs, recorded

__all__ = ["recorded"]

METHODS: dict[str, tuple[ops.Merge, str]] = {
    "regmean": (ops.regmean(), "gram"),
    "regmean_0.9": (ops.regmean(off_diagonal=0.9), "gram"),
    "fisher": (ops.fisher(), "fisher"),
}


def statistics_of(recorded: Arrays, case: str, kind: str) -> list[Arrays]:
    return [{"w": s.astype(np.float32)} for s in recorded[f"{case}/{kind}"]]


def with_statistics(jobs: list[Job], statistics: list[Any], reads: int | None = None) -> list[Job]:
    """The jobs with each model's statistics of their tensors, where all have them."""
    from dataclasses import replace

    return [
        replace(job, statistics=tuple(ArraySource(job.name, s[job.name]) for s in statistics), reads=reads)
        if all(job.name in s for s in statistics)
        else job
        for job in jobs
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_statistics_weigh_as_in_the_reference_in_memory_sharded_and_streamed(
    recorded: Arrays, name: str, case: str
) -> None:
    models, base = inputs(recorded, case)
    made, kind = METHODS[name]
    statistics, expected = statistics_of(recorded, case, kind), recorded[f"{case}/out/{name}"]
    assert error(made(models, statistics=statistics)["w"], expected) < 1e-6
    assert error(made(models, statistics=statistics[::-1])["w"], expected) > 1e-3
    if not case.endswith("T2"):
        return  # programs take their time to compile, and two models show as much as three
    assert error(made(models, base=base, statistics=statistics)["w"], expected) < 1e-6
    jitted = jax.jit(lambda m, s: made(m, statistics=s)["w"])(models, statistics)
    assert error(jitted, expected) < 1e-5
    rows, columns = (PartitionSpec("data", "model"), PartitionSpec(None, "data"))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    sharding = NamedSharding(mesh, rows)
    beside = NamedSharding(mesh, columns)
    sharded = made(jax.device_put(models, sharding), statistics=jax.device_put(statistics, beside))["w"]
    assert sharded.sharding.is_equivalent_to(sharding, 2)
    assert error(sharded, expected) < 1e-6
    jobs = with_statistics(jobs_for(made, models, None), statistics)
    assert error(streamed(jobs, threads=2)["w"], expected) < 1e-6


def test_fishers_are_cut_into_the_blocks_of_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1024)
    rng = np.random.default_rng(0)
    shapes = {"wide": (37, 130), "deep": (3, 5, 70), "scalar": (), "norm": (64,)}
    models = [{k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(3)]
    fishers = [{k: np.asarray(rng.random(s), np.float32) for k, s in shapes.items()} for _ in range(3)]
    made = ops.fisher(weight=[1, 2, 0.5], floor=0.1)
    found = streamed(with_statistics(jobs_for(made, models, None), fishers), threads=2)
    expected = made(models, statistics=fishers)
    for name in shapes:
        np.testing.assert_array_equal(found[name], expected[name])
        trust = [w * (f[name].astype(np.float64) + 0.1) for w, f in zip((1, 2, 0.5), fishers, strict=True)]
        mean = sum(t * m[name] for t, m in zip(trust, models, strict=True)) / sum(trust)
        np.testing.assert_allclose(found[name], mean, rtol=1e-5, atol=1e-6)


def least_squares(inputs: list[np.ndarray], maps: list[np.ndarray]) -> np.ndarray:
    x = np.concatenate(inputs, dtype=np.float64)
    y = np.concatenate([x @ w.T for x, w in zip(inputs, maps, strict=True)], dtype=np.float64)
    return np.linalg.lstsq(x, y, rcond=None)[0].T


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_regmean_of_two_linear_maps_is_pooled_least_squares(spread: float) -> None:
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, spread, 24)
    data = [(rng.standard_normal((400, 24)) * scales).astype(np.float32) for _ in range(2)]
    maps = [rng.standard_normal((9, 24)).astype(np.float32) for _ in range(2)]
    grams = [{"w": (x.T.astype(np.float64) @ x / len(x)).astype(np.float32)} for x in data]
    found = ops.regmean()([{"w": w} for w in maps], statistics=grams)["w"]
    assert error(found, least_squares(data, maps)) < 1e-5
    assert error(np.mean(maps, axis=0), least_squares(data, maps)) > 0.05


def test_a_kernel_that_reads_along_its_first_axis_is_merged_along_it(recorded: Arrays) -> None:
    models, _ = inputs(recorded, "12x20_T2")
    grams = statistics_of(recorded, "12x20_T2", "gram")
    turned = [{"w": m["w"].T} for m in models]
    found = ops.regmean()(turned, statistics=grams)["w"]
    assert error(found, recorded["12x20_T2/out/regmean"].T) < 1e-6
    square, _ = inputs(recorded, "16x16_T2")
    jobs = jobs_for(ops.regmean(), [{"w": np.ascontiguousarray(m["w"].T)} for m in square], None)
    beside = statistics_of(recorded, "16x16_T2", "gram")
    first = streamed(with_statistics(jobs, beside, reads=0))["w"]  # what only a table can say of a square
    assert error(first, recorded["16x16_T2/out/regmean"].T) < 1e-6
    assert error(streamed(with_statistics(jobs, beside))["w"], recorded["16x16_T2/out/regmean"].T) > 1e-3


def test_a_square_kernel_of_a_loaded_model_is_merged_along_its_inputs(recorded: Arrays) -> None:
    models, _ = inputs(recorded, "16x16_T2")
    grams = statistics_of(recorded, "16x16_T2", "gram")
    trees = [{"q": {"kernel": m["w"].T}} for m in models]  # [in, out], as flax keeps it
    found = ops.regmean()(trees, statistics=[{"q": {"kernel": g["w"]}} for g in grams])["q"]["kernel"]
    assert error(found, recorded["16x16_T2/out/regmean"].T) < 1e-6


def test_inputs_that_never_occur_leave_the_mean() -> None:
    """Gram matrices of few tokens have no inverse: where they say nothing, no model is better."""
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((5, 16)).astype(np.float32) for _ in range(2)]
    for x in data:
        x[:, 3] = 0
    maps = [rng.standard_normal((7, 16)).astype(np.float32) for _ in range(2)]
    grams = [{"w": x.T @ x / np.float32(5)} for x in data]
    found = np.asarray(ops.regmean()([{"w": w} for w in maps], statistics=grams)["w"], np.float64)
    np.testing.assert_allclose(found[:, 3], np.mean(maps, axis=0)[:, 3], atol=1e-5)
    for x, w in zip(data, maps, strict=True):  # ten inputs of sixteen features: both fit exactly
        np.testing.assert_allclose(x @ found.T, x @ w.T, atol=2e-3)
    zero = ops.regmean()([{"w": w} for w in maps], statistics=[{"w": np.zeros((16, 16))}] * 2)["w"]
    np.testing.assert_allclose(zero, np.mean(maps, axis=0), atol=1e-6)


def test_without_correlations_regmean_weighs_by_energy() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2)]
    grams = [np.cov(rng.standard_normal((6, 50))).astype(np.float32) for _ in range(2)]
    found = ops.regmean(off_diagonal=0)(
        [{"w": w} for w in maps], statistics=[{"w": jnp.asarray(g)} for g in grams]
    )
    energy = [np.diag(g) for g in grams]
    expected = sum(w * e for w, e in zip(maps, energy, strict=True)) / sum(energy)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_what_some_model_has_no_statistics_of_is_averaged(recorded: Arrays, name: str) -> None:
    models, _ = inputs(recorded, "12x20_T2")
    made, kind = METHODS[name]
    first, second = statistics_of(recorded, "12x20_T2", kind)
    trees = [{"w": m["w"], "norm": m["w"][0]} for m in models]
    found = made(trees, statistics=[first, second])
    assert error(found["w"], recorded[f"12x20_T2/out/{name}"]) < 1e-6
    mean = {k: np.mean([t[k] for t in trees], axis=0) for k in trees[0]}
    np.testing.assert_allclose(found["norm"], mean["norm"], rtol=1e-6)
    lacking = made(trees, statistics=[first, {}])
    np.testing.assert_allclose(lacking["w"], mean["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_statistics_that_do_not_fit_are_refused_in_one_sentence(recorded: Arrays, name: str) -> None:
    models, _ = inputs(recorded, "12x20_T2")
    made, kind = METHODS[name]
    statistics = statistics_of(recorded, "12x20_T2", kind)
    with pytest.raises(OperatorError, match=f"{name} weighs .* pass `statistics`"):
        made(models)
    with pytest.raises(OperatorError, match=r"statistics of 1 model\(s\) for 2"):
        made(models, statistics=statistics[:1])
    with pytest.raises(OperatorError, match=r"model 1 name no tensor of the models \(such as 'v'\)|did you"):
        made(models, statistics=[statistics[0], {"v": statistics[0]["w"]}])
    with pytest.raises(OperatorError, match=r"'w' of model 1 is \[3, 3\], but .*\[(12, )?20"):
        made(models, statistics=[statistics[0], {"w": np.zeros((3, 3), np.float32)}])
    with pytest.raises(OperatorError, match="linear takes no statistics"):
        ops.linear(weight=1)(models, statistics=statistics)
    broken = {"w": statistics[1]["w"].copy()}
    broken["w"][0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"statistic of tensor 'w' of model1 holds 1 NaN and 0"):
        streamed(with_statistics(jobs_for(made, models, None), [statistics[0], broken]))


def test_gram_matrices_belong_to_matrices() -> None:
    models = [{"v": np.ones(4, np.float32)}] * 2
    with pytest.raises(OperatorError, match="only a matrix has a Gram matrix"):
        ops.regmean()(models, statistics=[{"v": np.eye(4, dtype=np.float32)}] * 2)


def test_statistics_count_as_bytes_read_and_held(recorded: Arrays) -> None:
    models, _ = inputs(recorded, "12x20_T2")
    (plain,) = jobs_for(ops.regmean(), models, None)
    (job,) = with_statistics([plain], statistics_of(recorded, "12x20_T2", "gram"))
    assert job.bytes_in == plain.bytes_in + 2 * 4 * 20 * 20
    assert plain.bytes_whole == 0 < job.bytes_in < job.bytes_whole


def test_fisher_weights_may_be_swept_and_must_not_all_be_zero(recorded: Arrays) -> None:
    models, _ = inputs(recorded, "12x20_T2")
    fishers = statistics_of(recorded, "12x20_T2", "fisher")
    swept = jax.vmap(lambda w: ops.fisher(weight=w)(models, statistics=fishers)["w"])(jnp.eye(2))
    for one, model in zip(swept, models, strict=True):
        np.testing.assert_allclose(one, model["w"], rtol=1e-6)
    with pytest.raises(OperatorError, match="weights sum to 0"):
        ops.fisher(weight=[0, 0])
